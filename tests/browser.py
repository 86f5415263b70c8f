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
# What a page shows; TensorBoard's lies in shadow roots, which innerText leaves out.
TEXT = """(() => {
    const shadows = node => [...node.querySelectorAll('*')].flatMap(e => e.shadowRoot ? [e.shadowRoot, ...shadows(e.shadowRoot)] : [])
    return [document.body.innerText, ...shadows(document).map(root => [...root.children].map(e => e.innerText).join('\\n'))].join('\\n')
})()"""
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
        while missing := [text for text in texts if text not in (shown := self.evaluate(TEXT) or "")]:
            assert time.monotonic() < deadline, f"{missing} did not show; what shows:\n{shown}"
            time.sleep(0.2)
        return shown

    def scroll_to(self, text: str) -> None:
        """Brings the innermost element with this text to the middle."""
        found = f"[...document.querySelectorAll('*')].findLast(e => e.innerText?.includes({json.dumps(text)}))"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")

    def evaluate(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """What shows, once nothing moves any more."""
        deadline = time.monotonic() + DEADLINE_S
        before, now = b"", self._capture()
        while now != before and time.monotonic() < deadline:
            time.sleep(1)
            before, now = now, self._capture()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(now)

    def _capture(self) -> bytes:
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

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
