"""Everything that a server did wrong so far, each with how a fetch must end; shared by a test and a benchmark.

Two servers play the faults: the mirror's own, and `OddServer` for bodies that the mirror cannot send (endless, huge,
compressed, chunked, empty, too many redirects).
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

from greatctl.errors import GreatctlError
from greatctl.stages import fetch
from tests.test_fetch import BOOKS, PATH, SMALL, Bench, Mirror, leftovers


@dataclass(frozen=True)
class Fault:
    """One misbehaviour.

    Attributes:
        faults: what the mirror's server is told (`{}` is the book's path), or a mode of `OddServer`.
        code: what the run ends with; `resumes`: the rerun asks for the rest only.
    """

    name: str
    faults: tuple[str, ...]
    code: int
    settings: dict[str, Any] = field(default_factory=dict)
    odd: bool = False
    resumes: bool = False
    same: bool = True


QUICK = {"timeout": 0.3, "attempts": 2}
FAULTS = [
    Fault("429 with Retry-After, twice", ("{}=429:7@2",), 0),
    Fault("503 with Retry-After, once", ("{}=503:3@1",), 0),
    Fault("429 that asks for a day", ("{}=429:86400",), 7),
    Fault("503 for ever", ("{}=503",), 7),
    Fault("500 for ever", ("{}=500",), 7),
    Fault("404", ("{}=404",), 7),
    Fault("403", ("{}=403",), 7),
    Fault("cut once", ("{}=cut:20000@1",), 0),
    Fault("cut, then gone", ("{}=cut:30000@1", "{}=404"), 7, resumes=True),
    Fault("cut for ever", ("{}=cut:1000",), 7, resumes=True, settings={"attempts": 2, "deadline": 0.5}),
    Fault("stall", ("{}=stall:2",), 7, settings=QUICK),
    Fault("stall once", ("{}=stall:2@1",), 0, settings=QUICK),
    Fault("slow drip", ("{}=slow:20000",), 7, settings={"deadline": 0.6}, resumes=True),
    Fault("Content-Length too long, once", ("{}=badlength:+100@1",), 0),
    Fault("Content-Length too long", ("{}=badlength:+100",), 7),
    Fault("Content-Length too short, END marker there", ("{}=badlength:-100",), 6),
    Fault("Content-Length half", ("{}=badlength:-30000",), 6),
    Fault("truncated with 200", ("{}=truncate",), 6),
    Fault("HTML page for text", ("{}=robot",), 6),
    Fault("redirect loop", ("{}=redirect:loop",), 7),
    Fault("redirect to another host", ("{}=redirect:https://example.org/x.txt",), 7),
    Fault("redirect to plain http", ("{}=redirect:http://gutenberg.pglaf.org/x.txt",), 7),
    Fault("redirect to a metadata service", ("{}=redirect:http://169.254.169.254/latest",), 7),
    Fault("redirect to another local port", ("{}=redirect:http://127.0.0.1:1/x",), 7),
    Fault("redirect to a file", ("{}=redirect:file:///etc/passwd",), 7),
    Fault("Range ignored", ("{}=cut:20000@1", "{}=norange"), 0),
    Fault("ETag changed between parts", ("{}=cut:20000@1", "{}=changed@1"), 0, same=False),
    Fault("eleven redirects", ("hops",), 7, odd=True),
    Fault("endless body", ("endless",), 6, odd=True),
    Fault("10 GB announced", ("huge",), 6, odd=True),
    Fault("gzip bomb", ("gzip",), 6, odd=True),
    Fault("empty with 200", ("empty",), 6, odd=True),
    Fault("chunked, no length", ("chunked",), 0, odd=True),
    Fault("nobody listens", ("closed",), 7, odd=True, settings={"attempts": 2}),
]


@dataclass(frozen=True)
class Outcome:
    """How a fetch ended, what it left, and how the same command ended once the server behaved."""

    code: int
    reason: str
    waited: list[float]
    folder: bool
    waiting: int
    rerun: int
    range: str | None
    same: bool
    leftovers: list[str]


def play(fault: Fault, bench: Bench, mirror: Mirror, odd: str) -> Outcome:
    """Fetch one book under a fault, then once more without it."""
    waited: list[float] = []
    mirror.reset()
    base = mirror.url
    if fault.odd:
        base = "http://127.0.0.1:9" if fault.faults == ("closed",) else f"{odd}/{fault.faults[0]}"
    else:
        mirror.fault(*[spec.format(PATH[SMALL]) for spec in fault.faults])
    code, reason = 0, ""
    with mock.patch.object(fetch, "_patient", lambda run: waited.append):
        try:
            code = bench.run(source=[SMALL], mirror=base, **fault.settings).exit_code
        except GreatctlError as error:
            code, reason = error.exit_code, f"{error.message}: {error.why}"
        folder = bench.folder(SMALL).exists()
        waiting = sum(p.stat().st_size for p in bench.root.rglob("*.part"))
        mirror.reset()
        rerun = bench.run(source=[SMALL], mirror=mirror.url).exit_code
    asked = mirror.log()
    data = (bench.folder(SMALL) / "original.txt").read_bytes()
    same = data == (BOOKS / PATH[SMALL].lstrip("/")).read_bytes()
    spans = [request["headers"].get("Range") for request in asked]
    return Outcome(
        code, reason, waited, folder, waiting, rerun, spans[0] if spans else None, same, leftovers(bench.root)
    )


class _Odd(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *a: None  # noqa: E731

    def do_GET(self) -> None:
        mode, _, path = self.path.lstrip("/").partition("/")
        self.close_connection = True
        with suppress(OSError):
            getattr(self, f"_{mode}")(path)

    def _head(self, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content_Type": "text/plain", "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def _endless(self, path: str) -> None:
        self._head()
        while True:
            self.wfile.write(b"And so on, and so on, for ever.\n" * 2000)

    def _huge(self, path: str) -> None:
        self._head(Content_Length=10 * 2**30)
        self.wfile.write(b"x" * 65536)

    def _gzip(self, path: str) -> None:
        bomb = gzip.compress(b"\0" * 20_000_000)
        self._head(Content_Length=len(bomb), Content_Encoding="gzip")
        self.wfile.write(bomb)

    def _empty(self, path: str) -> None:
        self._head(Content_Length=0)

    def _chunked(self, path: str) -> None:
        self._head(Transfer_Encoding="chunked")
        data = (BOOKS / path).read_bytes()
        for at in range(0, len(data), 10_000):
            piece = data[at : at + 10_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def _hops(self, path: str) -> None:
        hop = int(path.partition("/")[0]) + 1 if path[:1].isdigit() and path[:2] != "ca" else 1
        self._head(302, Location=f"/hops/{hop}/x.txt", Content_Length=0)


@contextmanager
def odd_server() -> Iterator[str]:
    """The base address of a server with the modes above as first part of the path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    server.handle_error = lambda *a: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


__all__ = ["FAULTS", "Fault", "Outcome", "odd_server", "play"]
