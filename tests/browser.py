"""A headless Chromium that is told what to do over its DevTools protocol: open a page, wait for a text, take a picture."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE_S = 120.0
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]


class Browser:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._calls = socket, 0
        self._call("Page.enable")

    def open(self, url: str, *texts: str, width: int = 1280, height: int = 900) -> str:
        """Opens the page and returns its text, once all of these are in it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=url)
        return self.wait_for(*texts)

    def wait_for(self, *texts: str) -> str:
        deadline = time.monotonic() + DEADLINE_S
        while missing := [
            text for text in texts if text not in (shown := self.evaluate("document.body.innerText") or "")
        ]:
            assert time.monotonic() < deadline, f"{missing} did not show; what shows:\n{shown}"
            time.sleep(0.2)
        return shown

    def click(self, text: str) -> None:
        """On the innermost element that says just this."""
        found = f"[...document.querySelectorAll('*')].findLast(e => e.innerText?.trim() == {json.dumps(text)})"
        self.evaluate(f"{found}.click()")

    def evaluate(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """What shows, once the fonts and pictures of the page are there."""
        ready = "Promise.all([document.fonts.ready, ...[...document.images].map(i => i.decode().catch(() => 0))]).then(() => 1)"
        self._call("Runtime.evaluate", expression=ready, awaitPromise=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while (reply := json.loads(self._socket.recv(DEADLINE_S))).get("id") != self._calls:
            pass  # an event
        assert "error" not in reply, reply
        return reply["result"]


@contextmanager
def browser() -> Iterator[Browser]:
    assert CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr
            said = next(line for line in process.stderr if line.startswith("DevTools listening on ws://"))
            host = said.split("/")[2]
            with urllib.request.urlopen(f"http://{host}/json", timeout=DEADLINE_S) as listed:
                page = next(target for target in json.load(listed) if target["type"] == "page")
            with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait(DEADLINE_S)
