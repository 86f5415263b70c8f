"""Storage that lies elsewhere, on this machine: an S3 server, a stand-in of the Hugging Face hub, plain HTTP.

Real servers on 127.0.0.1, so that child processes reach them, too. Each can be told to fail at a given request.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import fsspec
import pytest

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

DEADLINE_S = 120.0  # for a request that a test waits for; only a hang comes near it
STATUSES = [str(status.value) for status in HTTPStatus]


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str  # decoded, without the query
    range: str | None = None
    length: int = 0  # of the body, in bytes


@dataclass
class Fault:
    """What happens to the next `times` matching requests, once `after` of them were answered as they should be."""

    method: str | None  # any, when None
    path: str  # end of the request's path
    what: str  # an HTTP status, "cut off", "hold" or "vanish"
    after: int = 0
    times: int = 1
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    dropped: bool = False  # a held request that is never answered

    def release(self, drop: bool = False) -> None:
        """Lets a held request take effect, or be refused, and waits until it has."""
        self.dropped = drop
        self.released.set()
        if self.reached.is_set():
            assert self.finished.wait(DEADLINE_S), f"{self.path} was not answered"


class Faults:
    """The requests that a server had, and what it was told to do to those to come."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forgets requests and faults; what is held goes on."""
        with self._lock:
            for fault in self._faults:
                fault.released.set()
            self._faults, self.requests = [], []

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def due(self, request: Request, *kinds: str) -> Fault | None:
        """The fault of one of these kinds, or of any kind, that this request meets."""
        with self._lock:
            for fault in self._faults:
                if kinds and fault.what not in kinds:
                    continue
                if not request.path.endswith(fault.path) or fault.method not in (None, request.method):
                    continue
                if fault.after:
                    fault.after -= 1
                elif fault.times:
                    fault.times -= 1
                    fault.reached.set()
                    return fault
        return None


# --- HTTP ------------------------------------------------------------------------------------------------------------


class FileServer:
    """Serves a folder over HTTP as a plain web server does: HEAD, GET and single ranges."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults = folder, Faults()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections stay open, as with real servers
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement

            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Request(self.command, unquote(urlsplit(self.path).path), self.headers.get("Range"))
                server.faults.record(request)
                try:
                    server.answer(self, request, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the test killed the client

            do_HEAD = do_GET = do_POST = _answer  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.faults.clear()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, path: str, times: int, status: int = 500) -> Fault:
        """Answers the next requests for what ends in `path` with this status."""
        return self.faults.add(Fault(None, path, str(status), times=times))

    def cut_off(self, path: str, times: int = 1, after: int = 0) -> Fault:
        """Closes the connection in the middle of the next answers with what ends in `path`."""
        return self.faults.add(Fault("GET", path, "cut off", after, times))

    def hold(self, path: str, after: int = 0) -> Fault:
        """Lets the next request for the content of what ends in `path` wait until it is released."""
        return self.faults.add(Fault("GET", path, "hold", after))

    def answer(self, handler: BaseHTTPRequestHandler, request: Request, body: bytes) -> None:
        file = (self.folder / request.path.lstrip("/")).resolve()
        if file.is_relative_to(self.folder.resolve()) and file.is_file():
            self.send_content(handler, request, file.read_bytes(), {"Last-Modified": formatdate(usegmt=True)})
        else:
            send(handler, 404)

    def send_content(
        self, handler: BaseHTTPRequestHandler, request: Request, content: bytes, headers: dict[str, str]
    ) -> None:
        """The bytes asked for, or what the server was told to do instead."""
        fault = self.faults.due(request, "hold", "cut off", *STATUSES)
        if fault is None:
            _send_range(handler, request, content, headers)
            return
        try:
            if fault.what == "hold":
                fault.released.wait(DEADLINE_S)
                _send_range(handler, request, content, headers)
            elif fault.what == "cut off":
                _send_range(handler, request, content, headers, cut_off=True)
            else:
                send(handler, int(fault.what))
        finally:
            fault.finished.set()


def _send_range(
    handler: BaseHTTPRequestHandler,
    request: Request,
    content: bytes,
    headers: dict[str, str],
    cut_off: bool = False,
) -> None:
    status, start, end = 200, 0, len(content)
    if match := re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or ""):
        first, last = match.groups()
        start = int(first) if first else max(0, end - int(last))
        end = min(end, int(last) + 1) if first and last else end
        if start >= len(content):
            send(handler, 416, headers={"Content-Range": f"bytes */{len(content)}"})
            return
        status, headers = 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
    headers = headers | {"Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    send(handler, status, content[start : start + (end - start) // 2 if cut_off else end], headers)
    if cut_off:
        handler.close_connection = True


def send(
    handler: BaseHTTPRequestHandler, status: int, content: bytes = b"", headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)
        handler.wfile.flush()


@pytest.fixture
def http_files(tmp_path: Path) -> Iterator[FileServer]:
    """A web server of an empty folder, `http_files.folder`, at `http_files.url`."""
    folder = tmp_path / "http_files"
    folder.mkdir()
    server = FileServer(folder)
    yield server
    server.stop()


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub(FileServer):
    """Answers what huggingface_hub and datasets ask the hub for, from datasets that a test adds file by file.

    Large files are answered as there: resolve/ redirects to another address, which takes ranges.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._revisions: dict[str, list[str]] = {}  # of each dataset, the newest last
        self._files: dict[tuple[str, str], dict[str, bytes]] = {}  # (dataset, revision) -> path -> content
        self.environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(self, name: str, path: str, content: bytes) -> None:
        """Puts a file into the newest revision of the dataset `owner/name`."""
        if name not in self._revisions:
            self.new_revision(name)
        self._files[name, self.revision(name)][path] = content

    def revision(self, name: str) -> str:
        """Commit of the dataset's newest revision."""
        return self._revisions[name][-1]

    def new_revision(self, name: str) -> str:
        """Makes a new commit of the files of the last one; the old one is still served."""
        revisions = self._revisions.setdefault(name, [])
        sha = hashlib.sha1(f"{name} {len(revisions)}".encode()).hexdigest()
        self._files[name, sha] = dict(self._files[name, revisions[-1]]) if revisions else {}
        revisions.append(sha)
        return sha

    def vanish(self, path: str, after: int = 0) -> None:
        """The file that ends in `path` cannot be read any more, after so many more requests; listings still have it."""
        self.faults.add(Fault("GET", path, "vanish", after, times=1 << 30))

    def answer(self, handler: BaseHTTPRequestHandler, request: Request, body: bytes) -> None:
        query = parse_qs(urlsplit(handler.path).query)
        path = request.path
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path):
            name, what, revision, inside = match.groups()
        elif match := re.fullmatch(r"/(?:(cdn)/)?datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            what, name, revision, inside = match[1] or "resolve", match[2], match[3], match[4]
        else:
            self._refuse(handler, 404, None, "Not Found")
            return
        if what in (None, "revision", "tree") and (fault := self.faults.due(request, *STATUSES)):
            send(handler, int(fault.what))
            return
        if name not in self._revisions:
            # To who is not logged in the hub says 401 and no code, which the client takes for a missing dataset only
            # at an https address.
            self._refuse(handler, 401, "RepoNotFound", "Invalid username or password.")
            return
        commit = self.revision(name) if revision in (None, "main") else revision
        if commit not in self._revisions[name]:
            self._refuse(handler, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = self._files[name, commit]
        if what in (None, "revision"):
            self._send_json(handler, self._info(name, commit, files))
        elif what == "tree":
            self._send_tree(handler, files, inside, recursive=query.get("recursive", [""])[0].lower() in ("true", "1"))
        elif what == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self._send_json(handler, [entry for wanted in paths for entry in self._entries(files, wanted.strip("/"))])
        elif inside not in files or (what == "resolve" and self.faults.due(request, "vanish")):
            self._refuse(handler, 404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        elif what == "resolve" and self._is_large(inside):
            content = files[inside]
            linked = {"X-Linked-ETag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            address = f"/cdn{quote(path)}"
            send(handler, 302, headers={"Location": self.url + address, "X-Repo-Commit": commit} | linked)
        else:
            content = files[inside]
            self.send_content(handler, request, content, {"ETag": f'"{_git_blob(content)}"', "X-Repo-Commit": commit})

    @staticmethod
    def _is_large(path: str) -> bool:
        return path.endswith(".parquet")

    def _info(self, name: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
        return {
            "_id": commit[:24],
            "id": name,
            "author": name.split("/")[0],
            "sha": commit,
            "lastModified": "2025-07-11T20:16:53.000Z",
            "createdAt": "2024-05-28T14:32:57.000Z",
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 1,
            "likes": 1,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def _entries(self, files: dict[str, bytes], path: str) -> list[dict[str, Any]]:
        """A file or a folder as the hub's listings have it; none where there is none."""
        if path in files:
            content = files[path]
            entry = {"type": "file", "oid": _git_blob(content), "size": len(content), "path": path}
            large = {"lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 134}}
            return [entry | (large if self._is_large(path) else {})]
        if not path or any(other.startswith(f"{path}/") for other in files):
            return [{"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}]
        return []

    def _send_tree(
        self, handler: BaseHTTPRequestHandler, files: dict[str, bytes], folder: str, recursive: bool
    ) -> None:
        prefix = f"{folder}/" if folder else ""
        below = [path for path in sorted(files) if path.startswith(prefix)]
        if folder and not below:
            self._refuse(handler, 404, "EntryNotFound", f"{folder} does not exist on this revision")
            return
        paths = dict.fromkeys(
            path[: len(prefix)] + "/".join(path[len(prefix) :].split("/")[:depth])
            for path in below
            for depth in range(1, path[len(prefix) :].count("/") + 2 if recursive else 2)
        )
        self._send_json(handler, [entry for path in paths for entry in self._entries(files, path)])

    def _send_json(self, handler: BaseHTTPRequestHandler, value: Any) -> None:
        send(handler, 200, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})

    def _refuse(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        code: str | None,
        message: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        said = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        send(handler, status, json.dumps({"error": message}).encode(), said | {"Content-Type": "application/json"})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub without datasets; `hub.environment` points a process at it."""
    server = Hub(tmp_path / "hf_home")
    yield server
    server.stop()


# --- S3 --------------------------------------------------------------------------------------------------------------


class S3:
    """A bucket on moto's S3 server."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self._server, self.bucket, self.faults = server, bucket, server.faults
        self.bucket_url, self.environment = f"s3://{bucket}", server.environment
        # Of its own, and without a memory of listings: others write, too.
        self.filesystem = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        self.filesystem.mkdir(bucket)

    def add(self, path: str, content: bytes) -> str:
        """Puts an object into the bucket and returns its URL."""
        self.filesystem.pipe_file(f"{self.bucket}/{path}", content)
        return f"{self.bucket_url}/{path}"

    def contents(self, folder: str) -> dict[str, bytes]:
        """Name, from the folder on, and bytes of each object below it."""
        paths = self.filesystem.find(f"{self.bucket}/{folder}")
        return {path.removeprefix(f"{self.bucket}/{folder}/"): self.filesystem.cat_file(path) for path in paths}

    def hold(self, method: str, path: str, after: int = 0) -> Fault:
        """Lets the next such request for what ends in `path` wait, before it takes effect, until it is released."""
        return self.faults.add(Fault(method, path, "hold", after))

    def fail(self, method: str, path: str, times: int, status: int = 503) -> Fault:
        """Answers the next such requests for what ends in `path` with this status."""
        return self.faults.add(Fault(method, path, str(status), times=times))

    def requests(self, method: str) -> list[str]:
        """What of the bucket was asked for by this method, in order."""
        prefix = f"/{self.bucket}/"
        return [r.path.removeprefix(prefix) for r in self.faults.requests if r.method == method]

    def watch(self, folder: str) -> list[dict[str, str]]:
        """A list that grows, with each request that changes something, by the files then in the folder: name -> MD5."""
        seen: list[dict[str, str]] = []

        def look() -> None:
            with contextlib.suppress(FileNotFoundError):
                found = self.filesystem.ls(f"{self.bucket}/{folder}", detail=True)
                files = [entry for entry in found if entry["type"] == "file"]
                seen.append({entry["name"].rpartition("/")[2]: entry["ETag"].strip('"') for entry in files})

        self._server.after_change = look
        return seen


class S3Server:
    """moto's S3 server, which tells what it was asked, and holds or refuses what it is told to."""

    def __init__(self, server: ThreadedMotoServer) -> None:
        host, port = server.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        self.faults = Faults()
        self.after_change: Callable[[], None] | None = None
        assert server._server is not None
        self._app = server._server.app
        server._server.app = self

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE"), length)
        if length:  # read first, so that a request that is held has arrived as a whole
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        self.faults.record(request)
        fault = self.faults.due(request, "hold", *STATUSES)
        if fault is None:
            return self._answer(request, environ, start_response)
        try:
            if fault.what == "hold":
                fault.released.wait(DEADLINE_S)
                if not fault.dropped:
                    return self._answer(request, environ, start_response)
            status = HTTPStatus(503 if fault.what == "hold" else int(fault.what))
            start_response(f"{status.value} {status.phrase}", [("Content-Length", "0")])
            return [b""]
        finally:
            fault.finished.set()

    def _answer(self, request: Request, environ: dict[str, Any], start_response: Any) -> Any:
        answer = self._app(environ, start_response)
        if request.method in ("PUT", "POST", "DELETE") and self.after_change:
            self.after_change()
        return answer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or it prints a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield S3Server(server)
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[S3]:
    """A fresh bucket, for this process and, with `s3.environment`, for others."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    bucket = S3(s3_server, f"bucket-{hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:12]}")
    s3_server.faults.clear()
    yield bucket
    s3_server.after_change = None
    s3_server.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()
