"""Headless Chromium through the pipe of its developer tools: open a page, ask it, photograph it, print it.

    with chromium() as browser:
        page = browser.open(path, width=390, height=844, dark=True, phone=True)
        page.ask("document.title"); page.shot(Path("phone.png")); page.problems; page.requests

Needs no package: messages are JSON ended by a zero byte, over two pipes that the browser finds as its files 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
          "--disable-extensions", "--disable-background-networking", "--disable-component-update",
          "--remote-debugging-pipe")  # fmt: skip
_PATIENCE = 120.0  # seconds for any one answer: the machine may be busy


class Browser:
    """The browser's end of the two pipes."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Ask for something and wait for its answer; what happens meanwhile is kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            for answer in self._messages(end - time.monotonic()):
                if answer.get("id") != self._number:
                    self.events.append(answer)
                elif "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                else:
                    return answer["result"]
        raise TimeoutError(f"{method}: no answer from the browser in {_PATIENCE:.0f} s")

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False
    ) -> Page:
        """A page from a file in a tab of its own, once it is loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        scale = 2 if phone else 1
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Page.navigate", url=path.absolute().as_uri())
        page.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        return page

    def _messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        """The whole messages that have come."""
        if not select.select([self._read], [], [], max(0.0, seconds))[0]:
            return
        data = os.read(self._read, 1 << 20)
        if not data:
            raise RuntimeError("the browser has gone")
        *whole, self._rest = (self._rest + data).split(b"\0")
        yield from map(json.loads, whole)


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self._browser.send(method, self._session, **params)

    def ask(self, expression: str) -> Any:
        """The value of an expression (or of the promise that it is).

        Raises:
            AssertionError: it threw.
        """
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true."""
        end = time.monotonic() + _PATIENCE
        while not self.ask(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def shot(self, path: Path) -> None:
        """A picture of what is in view."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def print(self, path: Path) -> None:
        """The page as a printer would get it, as PDF."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"]))

    @property
    def problems(self) -> list[str]:
        """Everything that the console complained of, policy violations and dialogs included."""
        kinds = {
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Runtime.consoleAPICalled",
            "Page.javascriptDialogOpening",
        }
        return [json.dumps(event["params"]) for event in self._events() if event["method"] in kinds]

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for, but what the page carries in itself."""
        sent = (e["params"]["request"]["url"] for e in self._events() if e["method"] == "Network.requestWillBeSent")
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def _events(self) -> list[dict[str, Any]]:
        self.ask("0")  # an answer comes after what happened before it
        return [e for e in self._browser.events if e.get("sessionId") == self._session]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, gone with all of it at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out} 2>/dev/null'
        command = ["bash", "-c", shell, "browser", BROWSER, *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        browser = Browser(ours_out, ours_in)
        try:
            yield browser
        finally:
            try:
                browser.send("Browser.close")
                process.wait(20)
            except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
                process.kill()
            process.wait()
            os.close(ours_out)
            os.close(ours_in)
