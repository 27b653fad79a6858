"""Polite, suspicious downloads.

The one place that speaks HTTP. It asks slowly (one connection a host, a pause between requests, Retry-After
obeyed), says who it is, contacts only hosts that the caller allows and only public addresses, follows
redirects by hand under the same rules, and resumes a broken download only when the server proves that it is
still the same file. Bytes are taken as they are (no content encoding), so sizes and ranges mean what they
say. `route.py` knows which address comes next, `manners.py` when.

Proxies of the environment (HTTPS_PROXY, ALL_PROXY) are not used: a proxy would resolve names and connect in our
stead, and then the check of the address that a name really leads to would be worth nothing. Behind a proxy, name a
mirror inside the network with `--mirror`.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from .. import __version__
from ..errors import IntegrityError, NetworkError
from .addresses import Resolve, arrows, failure, is_public, refusal, resolve
from .files import make_dir, sha256_file
from .manners import GiveUp, Manners, Passing, retry_after
from .part import Part
from .route import Route

__all__ = ["Client", "Fetched", "Progress"]

Progress = Callable[[int, int, int], None]
"""`(done, total or 0, bytes kept from an earlier run)`, called after each piece."""

MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Fetched:
    """A finished download: the complete file is at `path`.

    Attributes:
        chain: the address and each redirect's target, in their canonical form also where a mirror answered.
        resumed: bytes that an earlier run had brought.
        unchanged: the server said that the version one has is still the one; no byte came, and no file is there.
    """

    path: Path
    chain: tuple[str, ...]
    bytes: int
    sha256: str
    etag: str | None
    resumed: int
    unchanged: bool = False


class _Refused(Exception):
    """The rules forbid this address."""


class _Unchanged(Exception):
    """The server answered 304: the version named in the request is the present one."""


class Client:
    """Downloads under the rules above. Use as a context manager; one client is one run's manners (pace,
    known-down hosts).

    Args:
        contact: an address or URL for the User-Agent, so that a host can complain to somebody.
        mirror: base URL that replaces scheme and host of every first address; its path, if any, is put in
            front.
        mirror_trusted: a person named it, so it may be a private address.
        offline: refuse everything, with no connection made.
        pace: seconds between two requests to one host; None = 2, or 0 for a loopback mirror.
        timeout: seconds without a byte before an attempt counts as failed.
        deadline: seconds for one file, all attempts and waits together.
        attempts: failures in a row without progress before giving up.
        longest_wait: a Retry-After beyond this many seconds ends the download instead.
        resolve, clock, sleep, transport: replaced in tests; `transport` builds the transport of one host.
    """

    def __init__(
        self,
        *,
        contact: str = "",
        mirror: str | None = None,
        mirror_trusted: bool = True,
        offline: bool = False,
        pace: float | None = None,
        timeout: float = 30.0,
        deadline: float = 900.0,
        attempts: int = 4,
        longest_wait: float = 300.0,
        resolve: Resolve = resolve,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        transport: Callable[[], httpx2.BaseTransport] | None = None,
    ) -> None:
        self._route = Route(mirror, trusted=mirror_trusted, offline=offline)
        pause = pace if pace is not None else (0.0 if self._route.local else 2.0)
        self._manners = Manners(pause, attempts, longest_wait, clock, sleep)
        self._deadline, self._clock = deadline, clock
        agent = f"greatctl/{__version__}" + (f" (+{contact})" if contact else "")
        self._http = httpx2.Client(
            transport=_Guard(resolve, self._route.private_allowed, transport or _one_connection),
            headers={"User-Agent": agent, "Accept-Encoding": "identity", "Accept": "*/*"},
            timeout=timeout,
            follow_redirects=False,
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def get(self, url: str, hosts: Collection[str], folder: Path, *, max_bytes: int = 8 * 2**20) -> bytes:
        """The body of a small record, kept in `folder` only while it is fetched. Raises as `download`."""
        path = folder / "record.part"
        body = self.download(url, path, hosts, max_bytes=max_bytes).path.read_bytes()
        Part(path, url).drop()
        return body

    def download(
        self,
        url: str,
        part_path: Path,
        hosts: Collection[str],
        *,
        max_bytes: int = 64 * 2**20,
        unless: str | None = None,
        progress: Progress | None = None,
    ) -> Fetched:
        """Bring `url` to `part_path`, going on from what an earlier run left there.

        The caller moves or drops the file (`Part(part_path, url).drop()`); a finished one is not asked for
        again.

        Args:
            hosts: the only hosts that may be asked or redirected to.
            unless: ETag of a version that one has; if it is still the present one, nothing is brought.

        Raises:
            NetworkError: refused by the rules, not found, or still failing after the retries; names the
                chain.
            IntegrityError: empty, encoded, or larger than `max_bytes`.
        """
        make_dir(part_path.parent)
        part = Part(part_path, url)
        kept = part.size
        end = self._clock() + self._deadline
        failures, best = 0, kept
        while not part.complete:
            chain: list[str] = []
            try:
                tell = (lambda done, total: progress(done, total, kept)) if progress else None
                self._transfer(url, chain, part, hosts, max_bytes, end, unless, tell)
            except _Unchanged:
                return Fetched(part.path, tuple(self._route.canonical(url, chain)), 0, "", unless, 0, unchanged=True)
            except Passing as passing:
                failures = 1 if part.size > best else failures + 1
                best = max(best, part.size)
                try:
                    self._manners.after(passing, urlsplit(chain[-1] if chain else url).netloc, failures, end)
                except GiveUp as final:
                    raise failure(chain or [url], str(final)) from passing
        return Fetched(part.path, part.chain, part.size, sha256_file(part.path), part.etag, kept)

    def post(
        self, url: str, body: bytes, hosts: Collection[str], headers: Mapping[str, str], *, max_bytes: int = 4 * 2**20
    ) -> tuple[int, bytes]:
        """Send `body` to `url` and bring the answer: its status and its body.

        Passing failures (429 and 503 with Retry-After among them) are met as in `download`. No redirect is followed: what
        the headers hold is for this address alone.

        Raises:
            NetworkError: refused by the rules, or still failing after the retries.
            IntegrityError: the answer is larger than `max_bytes`, or encoded.
        """
        target = self._route.first(url, [], hosts)
        end, failures = self._clock() + self._deadline, 0
        while True:
            try:
                answer = self._send(target, [target], dict(headers), body)
                with contextlib.closing(answer), _passing_failures():
                    return answer.status_code, self._body(answer, target, end, max_bytes)
            except Passing as passing:
                failures += 1
                try:
                    self._manners.after(passing, urlsplit(target).netloc, failures, end)
                except GiveUp as final:
                    raise failure([target], str(final)) from passing

    def _body(self, answer: httpx2.Response, target: str, end: float, max_bytes: int) -> bytes:
        """The body of an answer that is final."""
        if answer.status_code in _TRANSIENT:
            raise Passing(f"the server answered {answer.status_code}", retry_after(answer.headers.get("Retry-After")))
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise _encoded([target])
        body = bytearray()
        for piece in answer.iter_raw():
            body += piece
            if len(body) > max_bytes:
                raise _too_large([target], max_bytes)
            if self._clock() > end:
                raise failure([target], f"not finished within {self._deadline:,.0f} s")
        return bytes(body)

    def _transfer(
        self,
        url: str,
        chain: list[str],
        part: Part,
        hosts: Collection[str],
        max_bytes: int,
        end: float,
        unless: str | None,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        """One attempt: ask (for the rest, where something is there), check the answer, append the body."""
        headers = {"If-None-Match": unless} if unless and not part.size else {}
        if part.size and part.etag:
            headers = {"Range": f"bytes={part.size}-", "If-Range": part.etag}
        with self._open(url, chain, hosts, headers) as answer:
            if answer.status_code == 304 and "If-None-Match" in headers:
                raise _Unchanged
            _accept(answer, part, chain, self._route.canonical(url, chain), max_bytes)
            with part.appending() as write:
                for piece in answer.iter_raw():
                    if part.size + len(piece) > max_bytes:
                        part.drop()
                        raise _too_large(chain, max_bytes)
                    write(piece)
                    if progress:
                        progress(part.size, part.total or 0)
                    if self._clock() > end:
                        raise failure(chain, f"not finished within {self._deadline:,.0f} s; what came is kept")
            if part.total is not None and part.size != part.total:
                raise Passing(f"the connection ended after {part.size:,} of {part.total:,} bytes")
        if not part.size:
            part.drop()
            raise IntegrityError("the server sent an empty file", why="status 200 and no byte", where=arrows(chain))
        part.finish()

    @contextlib.contextmanager
    def _open(
        self, url: str, chain: list[str], hosts: Collection[str], headers: dict[str, str]
    ) -> Iterator[httpx2.Response]:
        """Send the request, following redirects by hand; `chain` grows by every address asked."""
        target = self._route.first(url, chain, hosts)
        while True:
            if target in chain:
                raise refusal([*chain, target], "the redirects go in a circle")
            chain.append(target)
            if len(chain) > MAX_REDIRECTS + 1:
                raise refusal(chain, f"more than {MAX_REDIRECTS} redirects")
            answer = self._send(target, chain, headers)
            try:
                location = answer.headers.get("Location") if answer.status_code in _REDIRECTS else None
                if location is None:
                    with _passing_failures():
                        yield answer
                    return
                target = self._route.next(target, location, chain, hosts)
            finally:
                answer.close()

    def _send(self, url: str, chain: list[str], headers: dict[str, str], body: bytes | None = None) -> httpx2.Response:
        """One paced request (a POST where there is a body); the answer's body is not read yet."""
        parts = urlsplit(url)
        try:
            self._manners.before(parts.netloc)
            with _passing_failures():
                method = "GET" if body is None else "POST"
                request = self._http.build_request(method, url, headers=headers, content=body)
                return self._http.send(request, stream=True)
        except GiveUp as known:
            raise failure(chain, str(known)) from None
        except (_Refused, httpx2.InvalidURL) as refused:
            raise refusal(chain, str(refused)) from None
        except (OSError, UnicodeError) as error:  # of the resolver
            why = f"the name {parts.hostname} cannot be resolved ({getattr(error, 'strerror', None) or error})"
            self._manners.down(parts.netloc, why)
            raise failure(chain, why) from error


class _Guard(httpx2.BaseTransport):
    """Resolves, checks and pins the address of every request; keeps one transport, hence one connection, a
    host.
    """

    def __init__(
        self,
        resolve: Resolve,
        private_allowed: Callable[[str], bool],
        build: Callable[[], httpx2.BaseTransport],
    ) -> None:
        self._resolve, self._private_allowed, self._build = resolve, private_allowed, build
        self._hosts: dict[str, httpx2.BaseTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send `request` to an address that was checked; the name stays in Host and in the TLS handshake."""
        url = request.url
        addresses = list(self._resolve(url.host, url.port or (443 if url.scheme == "https" else 80)))
        if not self._private_allowed(str(url)):
            refused = [a for a in addresses if not is_public(a)]
            addresses = [a for a in addresses if is_public(a)]
            if refused and not addresses:
                raise _Refused(f"{url.host} is the private address {refused[0]}")
        if not addresses:
            raise _Refused(f"{url.host} has no address")
        key = f"{url.scheme}://{url.netloc.decode()}"
        if key not in self._hosts:
            self._hosts[key] = self._build()
        inner = self._hosts[key]
        request.extensions = {**request.extensions, "sni_hostname": url.host}
        for address in addresses[:-1]:
            request.url = url.copy_with(host=address)
            with contextlib.suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
                return inner.handle_request(request)
        request.url = url.copy_with(host=addresses[-1])
        return inner.handle_request(request)

    def close(self) -> None:
        """Close every connection."""
        for transport in self._hosts.values():
            transport.close()


def _one_connection() -> httpx2.BaseTransport:
    return httpx2.HTTPTransport(limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1))


def _accept(answer: httpx2.Response, part: Part, chain: list[str], canonical: list[str], max_bytes: int) -> None:
    """Check status and headers, and make `part` ready for the body that follows."""
    status, headers = answer.status_code, answer.headers
    etag = headers.get("ETag")
    if status == 206:
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
        if not span or int(span[1]) != part.size or int(span[3]) != part.total or etag != part.etag:
            part.drop()
            raise Passing("the server's partial answer does not fit what is here; starting again")
    elif status == 200:
        length = headers.get("Content-Length", "")
        part.restart(etag, int(length) if length.isdigit() else None, canonical)
    elif status == 416:
        part.drop()
        raise Passing("the server has no more bytes than are here; starting again")
    elif status in _TRANSIENT:
        raise Passing(f"the server answered {status}", retry_after(headers.get("Retry-After")))
    else:
        raise NetworkError(
            f"the server answered {status}",
            why="not found there" if status in (404, 410) else "the request was not accepted",
            fix="look at the address in a browser; correct `url` in sources.toml, or choose another --mirror",
            where=arrows(chain),
            code=f"http-{status}",
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        part.drop()
        raise _encoded(chain)
    if (part.total or 0) > max_bytes:
        part.drop()
        raise _too_large(chain, max_bytes)


@contextlib.contextmanager
def _passing_failures() -> Iterator[None]:
    """Turn what the HTTP library raises for a broken connection into `Passing` with the cause named."""
    try:
        yield
    except httpx2.TransportError as error:
        unreachable = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        cause = error.__cause__ or error.__context__
        tls = "TLS failed: " if isinstance(cause, ssl.SSLError) or "CERTIFICATE" in str(error) else ""
        raise Passing(f"{tls}{str(error) or type(error).__name__}", unreachable=unreachable) from error


def _encoded(chain: Collection[str]) -> IntegrityError:
    return IntegrityError("the server sent an encoded body", why="identity was asked for", where=arrows(chain))


def _too_large(chain: Collection[str], max_bytes: int) -> IntegrityError:
    return IntegrityError(
        "the file is larger than it may be",
        why=f"more than {max_bytes:,} bytes",
        where=arrows(chain),
        code="too-large",
    )
