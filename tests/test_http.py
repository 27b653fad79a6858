"""Downloads: what is refused, what is retried, what is resumed, and that nothing is ever spliced."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import httpx2
import pytest

from greatctl.errors import IntegrityError, NetworkError, UsageError
from greatctl.store.addresses import host_matches, is_public
from greatctl.store.http import Client
from greatctl.store.manners import retry_after
from greatctl.store.part import Part

URL = "https://books.example.org/a.txt"
HOSTS = {"books.example.org", "*.data.example.org"}
BODY = bytes(range(256)) * 2000

Answer = Callable[[httpx2.Request], httpx2.Response]


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Body(httpx2.SyncByteStream):
    """A body as it comes over a wire; with `cut`, the connection then breaks."""

    def __init__(self, pieces: bytes | Iterable[bytes], *, cut: bool = False) -> None:
        self.pieces = [pieces] if isinstance(pieces, bytes) else pieces
        self.cut = cut

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        if self.cut:
            raise httpx2.RemoteProtocolError("peer closed connection")


class Server:
    """A scripted server: one answer a request, the last one again and again; remembers the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return self.answers[min(len(self.requests), len(self.answers)) - 1](request)


def client(server: Server, clock: Clock | None = None, **options: object) -> Client:
    clock = clock or Clock()
    settings = {"clock": clock, "sleep": clock.sleep, "resolve": lambda host, port: ["8.8.8.8"], **options}
    return Client(transport=lambda: httpx2.MockTransport(server), **settings)  # type: ignore[arg-type]


def whole(etag: str = '"v1"', body: bytes = BODY) -> Answer:
    headers = {"ETag": etag, "Content-Length": str(len(body))}
    return lambda request: httpx2.Response(200, headers=headers, stream=Body(body))


def status(code: int, **headers: str) -> Answer:
    return lambda request: httpx2.Response(code, headers={k.replace("_", "-"): v for k, v in headers.items()})


def cut_after(count: int, etag: str = '"v1"') -> Answer:
    headers = {"ETag": etag, "Content-Length": str(len(BODY))}
    return lambda request: httpx2.Response(200, headers=headers, stream=Body(BODY[:count], cut=True))


def rest(request: httpx2.Request, etag: str = '"v1"', shift: int = 0) -> httpx2.Response:
    start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
    headers = {"ETag": etag, "Content-Range": f"bytes {start + shift}-{len(BODY) - 1}/{len(BODY)}"}
    return httpx2.Response(206, headers=headers, stream=Body(BODY[start:]))


def test_a_plain_download_brings_the_bytes_and_says_who_asks(tmp_path: Path) -> None:
    server = Server(whole())
    with client(server, contact="mailto:me@example.org") as http:
        got = http.download(URL, tmp_path / "a.part", HOSTS)
    assert got.path.read_bytes() == BODY
    assert got.sha256 == hashlib.sha256(BODY).hexdigest()
    assert got.chain == (URL,)
    headers = server.requests[0].headers
    assert headers["User-Agent"].startswith("greatctl/") and "(+mailto:me@example.org)" in headers["User-Agent"]
    assert headers["Accept-Encoding"] == "identity"


def test_the_connection_goes_to_the_address_that_was_checked_under_the_hosts_name(tmp_path: Path) -> None:
    server = Server(whole())
    with client(server) as http:
        http.download(URL, tmp_path / "a.part", HOSTS)
    request = server.requests[0]
    assert (request.url.host, request.headers["Host"]) == ("8.8.8.8", "books.example.org")
    assert request.extensions["sni_hostname"] == "books.example.org"


def test_a_broken_download_is_resumed_with_a_range_and_gives_the_same_bytes(tmp_path: Path) -> None:
    server = Server(cut_after(200_000), rest)
    with client(server) as http:
        got = http.download(URL, tmp_path / "a.part", HOSTS)
    assert got.path.read_bytes() == BODY
    assert server.requests[1].headers["Range"] == "bytes=200000-"
    assert server.requests[1].headers["If-Range"] == '"v1"'


def test_a_download_resumes_in_another_process_and_a_finished_one_asks_nothing(tmp_path: Path) -> None:
    with client(Server(cut_after(100_000), status(404))) as http, pytest.raises(NetworkError):
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert (tmp_path / "a.part").stat().st_size == 100_000
    server = Server(rest)
    with client(server) as http:
        got = http.download(URL, tmp_path / "a.part", HOSTS)
        assert (got.path.read_bytes(), got.resumed) == (BODY, 100_000)
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "second",
    [
        whole('"v2"', BODY[::-1]),
        lambda request: rest(request, etag='"v2"'),
        lambda request: rest(request, shift=7),
        status(416, Content_Range="bytes */5"),
    ],
    ids=["range ignored", "etag changed", "wrong content-range", "416"],
)
def test_parts_that_do_not_fit_are_thrown_away_and_never_spliced(tmp_path: Path, second: Answer) -> None:
    server = Server(cut_after(200_000), second, whole('"v2"', BODY[::-1]))
    with client(server) as http:
        got = http.download(URL, tmp_path / "a.part", HOSTS)
    assert got.path.read_bytes() == BODY[::-1]


def test_without_a_strong_etag_a_broken_download_starts_again(tmp_path: Path) -> None:
    server = Server(cut_after(200_000, 'W/"weak"'), whole())
    with client(server) as http:
        assert http.download(URL, tmp_path / "a.part", HOSTS).path.read_bytes() == BODY
    assert "Range" not in server.requests[1].headers


def test_retry_after_is_obeyed_and_server_errors_wait_longer_each_time(tmp_path: Path) -> None:
    clock = Clock()
    server = Server(status(429, Retry_After="30"), status(503), status(500), whole())
    with client(server, clock, pace=0) as http:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert clock.slept == [30.0, 2.0, 4.0]


def test_an_excessive_retry_after_ends_the_download_at_once(tmp_path: Path) -> None:
    clock = Clock()
    with (
        client(Server(status(429, Retry_After="86400")), clock) as http,
        pytest.raises(NetworkError, match="failed") as e,
    ):
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert "86,400 s" in e.value.why and clock.slept == []


def test_a_retry_after_date_counts_from_now() -> None:
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Fri, 31 Dec 2100 23:59:59 GMT") > 1e6
    assert retry_after("soon") == 0


def test_requests_to_one_host_are_paced_two_seconds_by_default(tmp_path: Path) -> None:
    clock = Clock()
    with client(Server(whole()), clock) as http:
        for name in "abc":
            http.download(URL, tmp_path / name, HOSTS)
    assert clock.slept == [2.0, 2.0]


def test_not_found_is_not_retried(tmp_path: Path) -> None:
    server = Server(status(404))
    with client(server) as http, pytest.raises(NetworkError) as e:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert e.value.exit_code == 7 and e.value.name == "http-404"
    assert len(server.requests) == 1


def test_a_host_that_cannot_be_reached_is_asked_no_more_in_this_run(tmp_path: Path) -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("connection refused")

    server = Server(refuse)
    with client(server) as http:
        for name in "ab":
            with pytest.raises(NetworkError, match="failed") as e:
                http.download(URL, tmp_path / name, HOSTS)
            assert "connection refused" in e.value.why
    assert len(server.requests) == 4


def test_an_unknown_name_fails_at_once_with_the_cause(tmp_path: Path) -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with client(Server(whole()), resolve=unknown) as http, pytest.raises(NetworkError) as e:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert "books.example.org cannot be resolved" in e.value.why


def redirect(*targets: str) -> Server:
    return Server(*[status(302, Location=t) for t in targets], whole())


def test_redirects_to_allowed_hosts_are_followed_and_recorded(tmp_path: Path) -> None:
    with client(redirect("/b.txt", "https://ia1.data.example.org/c.txt")) as http:
        got = http.download(URL, tmp_path / "a.part", HOSTS)
    assert got.chain == (URL, "https://books.example.org/b.txt", "https://ia1.data.example.org/c.txt")


@pytest.mark.parametrize(
    "target",
    [
        "http://books.example.org/a.txt",
        "file:///etc/passwd",
        "https://evil.example.net/a.txt",
        "https://data.example.org.evil.net/",
        "https://user@books.example.org/a.txt",
        "https://books.example.org:8443/a.txt",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1/a.txt",
        "https://books.example.org/\x01",
        URL,
    ],
)
def test_redirects_that_leave_the_rules_are_refused_with_the_chain(tmp_path: Path, target: str) -> None:
    server = redirect(target)
    with client(server) as http, pytest.raises(NetworkError) as e:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert e.value.name == "address-refused"
    assert f"{URL} -> " in e.value.why
    assert len(server.requests) == 1 and not (tmp_path / "a.part").exists()


def test_the_eleventh_redirect_is_refused(tmp_path: Path) -> None:
    server = redirect(*[f"/{i}.txt" for i in range(11)])
    with client(server) as http, pytest.raises(NetworkError) as e:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert "more than 10 redirects" in e.value.why
    with client(redirect(*[f"/{i}.txt" for i in range(10)])) as http:
        assert len(http.download(URL, tmp_path / "b.part", HOSTS).chain) == 11


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:192.168.0.1", "fe80::1%eth0"]
)
def test_a_name_that_resolves_to_a_private_address_is_never_connected_to(tmp_path: Path, address: str) -> None:
    server = Server(whole())
    with client(server, resolve=lambda host, port: [address]) as http, pytest.raises(NetworkError) as e:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert "private address" in e.value.why and server.requests == []
    assert not is_public(address)


def test_offline_makes_no_connection_not_even_to_a_name_server(tmp_path: Path) -> None:
    def forbidden(host: str, port: int) -> list[str]:
        raise AssertionError("asked the resolver")

    server = Server(whole())
    with client(server, offline=True, resolve=forbidden) as http, pytest.raises(NetworkError) as e:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert e.value.name == "offline" and server.requests == []


def test_a_mirror_replaces_scheme_and_host_keeps_the_path_and_stays_out_of_the_chain(tmp_path: Path) -> None:
    server = Server(status(302, Location="/other/b.txt"), whole())
    private = {"resolve": lambda host, port: ["127.0.0.1"]}
    with client(server, mirror="http://127.0.0.1:8123/base", **private) as http:
        got = http.download(URL + "?x=1", tmp_path / "a.part", HOSTS)
    assert str(server.requests[0].url) == "http://127.0.0.1:8123/base/a.txt?x=1"
    assert got.chain[0] == URL + "?x=1"


def test_a_mirror_may_not_send_elsewhere_on_this_machine(tmp_path: Path) -> None:
    server = redirect("http://127.0.0.1:9/secret")
    private = {"resolve": lambda host, port: ["127.0.0.1"]}
    with client(server, mirror="http://127.0.0.1:8123", **private) as http, pytest.raises(NetworkError):
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert len(server.requests) == 1


@pytest.mark.parametrize("base", ["ftp://x.org", "127.0.0.1:80", "http://", "http://a:b@x.org", "http://x.org:99999"])
def test_a_mirror_that_is_no_address_is_a_usage_error(base: str) -> None:
    with pytest.raises(UsageError, match="mirror"):
        Client(mirror=base)


def test_a_body_beyond_the_cap_is_stopped_whether_announced_or_not(tmp_path: Path) -> None:
    def endless(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, stream=Body(b"x" * 65536 for _ in range(10**9)))

    for server in (Server(whole()), Server(endless)):
        with client(server) as http, pytest.raises(IntegrityError) as e:
            http.download(URL, tmp_path / "a.part", HOSTS, max_bytes=100_000)
        assert e.value.name == "too-large"
        assert list(tmp_path.iterdir()) == []


def test_an_empty_and_an_encoded_body_are_refused(tmp_path: Path) -> None:
    encoded = lambda request: httpx2.Response(200, headers={"Content-Encoding": "gzip"}, stream=Body(b"x"))  # noqa: E731
    for answer in (whole(body=b""), encoded):
        with client(Server(answer)) as http, pytest.raises(IntegrityError):
            http.download(URL, tmp_path / "a.part", HOSTS)
        assert not (tmp_path / "a.part").exists()


def test_a_drip_ends_at_the_deadline_and_what_came_is_kept(tmp_path: Path) -> None:
    clock = Clock()

    def drip() -> Iterator[bytes]:
        for i in range(10_000):
            clock.now += 1
            yield BODY[i * 50 : i * 50 + 50]

    headers = {"ETag": '"v1"', "Content-Length": str(len(BODY))}
    server = Server(lambda request: httpx2.Response(200, headers=headers, stream=Body(drip())))
    with client(server, clock, deadline=60) as http, pytest.raises(NetworkError) as e:
        http.download(URL, tmp_path / "a.part", HOSTS)
    assert "within 60 s" in e.value.why


def test_progress_tells_what_an_earlier_run_had_brought(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    with client(Server(cut_after(100_000), status(404))) as http, pytest.raises(NetworkError):
        http.download(URL, tmp_path / "a.part", HOSTS)
    with client(Server(rest)) as http:
        http.download(URL, tmp_path / "a.part", HOSTS, progress=lambda *state: seen.append(state))
    assert seen[-1] == (len(BODY), len(BODY), 100_000)


def test_bytes_without_a_trustworthy_note_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    path.write_bytes(b"strange")
    assert Part(path, URL).size == 0 and not path.exists()
    part = Part(path, URL)
    part.restart('"v1"', 100, [URL])
    with part.appending() as write:
        write(b"0123456789")
    assert Part(path, URL).size == 10
    note = tmp_path / "a.part.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "url": "https://other.example.org"}))
    assert Part(path, URL).size == 0


def test_get_returns_a_small_record_and_leaves_nothing(tmp_path: Path) -> None:
    with client(Server(whole(body=b'{"a": 1}'))) as http:
        assert http.get(URL, HOSTS, tmp_path) == b'{"a": 1}'
    assert list(tmp_path.iterdir()) == []


def test_host_patterns_match_whole_labels_only() -> None:
    assert host_matches("IA1.Data.Example.org", HOSTS)
    assert not host_matches("data.example.org", HOSTS)
    assert not host_matches("xdata.example.org", HOSTS)
