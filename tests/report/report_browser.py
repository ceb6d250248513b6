"""A headless Chromium over the WebDriver protocol, with the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
needs_browser = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)} here: the page needs a browser to be tested in"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One session."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        wanted = {
            "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = self._call("POST", self.base, {"capabilities": {"alwaysMatch": wanted}})
        self.base += "/" + answer["sessionId"]

    def _call(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        payload = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(url, payload, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:600]) from None

    def open(self, page: Path | str) -> None:
        """A file, or an address."""
        self._call("POST", f"{self.base}/url", {"url": page if isinstance(page, str) else page.as_uri()})

    def js(self, script: str, *arguments: Any) -> Any:
        """The value of a function body in the page."""
        return self._call("POST", f"{self.base}/execute/sync", {"script": script, "args": list(arguments)})

    def size(self, width: int, height: int) -> None:
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", values)

    def dark(self, on: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def devtools(self, command: str, values: dict[str, Any]) -> Any:
        return self._call("POST", f"{self.base}/goog/cdp/execute", {"cmd": command, "params": values})

    def hover(self, selector: str, place: int = 0) -> None:
        """Move the pointer to the middle of an element."""
        self.js(
            "const e = document.querySelectorAll(arguments[0])[arguments[1]];"
            "e.scrollIntoView({block: 'center', behavior: 'instant'})",
            selector,
            place,
        )
        body = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self.base}/elements", body)[place][ELEMENT]
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {ELEMENT: element}}
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self._call("POST", f"{self.base}/actions", {"actions": [pointer]})

    def box(self, selector: str) -> list[float]:
        """Left, top, width and height of an element in the window."""
        script = "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        return list(self.js(f"{script} return [b.x, b.y, b.width, b.height]", selector))

    def _pointer(self, kind: str, actions: list[dict[str, Any]]) -> None:
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self._call("POST", f"{self.base}/actions", {"actions": [pointer]})

    def drag(self, selector: str, begin: float, end: float, kind: str = "mouse") -> None:
        """Press on an element, at a share of its width from its left, move along and let go; "touch" = a finger."""
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector)
        x, y, width, height = self.box(selector)
        at = [
            {"type": "pointerMove", "duration": 0, "x": round(x + share * width), "y": round(y + height / 2)}
            for share in (begin, (begin + end) / 2, end)
        ]
        self._pointer(kind, [at[0], {"type": "pointerDown", "button": 0}, *at[1:], {"type": "pointerUp", "button": 0}])

    def double_click(self, selector: str) -> None:
        x, y, width, height = self.box(selector)
        move = {"type": "pointerMove", "duration": 0, "x": round(x + width / 2), "y": round(y + height / 2)}
        click = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._pointer("mouse", [move, *click, *click])

    def press(self, key: str) -> None:
        downs = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._call("POST", f"{self.base}/actions", {"actions": [{"type": "key", "id": "keys", "actions": downs}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """New entries of the console ("browser") or of the network and the page ("performance")."""
        return self._call("POST", f"{self.base}/se/log", {"type": kind})  # type: ignore[no-any-return]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"{self.base}/screenshot")))

    def close(self) -> None:
        self._call("DELETE", self.base)


@contextmanager
def started(log: Path) -> Iterator[Browser]:
    """A driver on a port of its own choice, ended with the block."""
    with log.open("w") as file:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=file, stderr=subprocess.STDOUT)
    try:
        browser = Browser(_port(log))
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(20)


def _port(log: Path) -> int:
    for _ in range(200):
        for line in log.read_text().splitlines():
            if "started successfully on port" in line:
                return int(line.rstrip(".").split()[-1])
        time.sleep(0.05)
    raise AssertionError(f"chromedriver said no port: {log.read_text()}")
