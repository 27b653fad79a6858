"""Which addresses may be contacted.

A manifest, a plugin or a redirect can name any host, and a name can resolve to anything. So the decision is
made on the addresses themselves, at the moment of connecting, and the connection goes to the very address
that was checked.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection, Sequence
from urllib.parse import SplitResult, urlsplit

from ..errors import NetworkError, UsageError
from ..urls import url_problem

__all__ = [
    "Resolve",
    "arrows",
    "check",
    "failure",
    "host_matches",
    "is_loopback",
    "is_public",
    "mirror_base",
    "origin",
    "refusal",
    "resolve",
    "split",
]

Resolve = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """Every address of `host`, in the system's order of preference.

    Raises:
        OSError: the name is not known, or the resolver failed.
    """
    rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


def is_public(address: str) -> bool:
    """True for an address of the open Internet: not private, loopback, link-local or multicast, in any IPv6
    disguise.
    """
    plain = address.split("%")[0]
    return url_problem(f"https://[{plain}]/" if ":" in plain else f"https://{plain}/") is None


def is_loopback(host: str) -> bool:
    """True for `localhost` and literal loopback addresses; no name is resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.casefold() == "localhost"


def host_matches(host: str, patterns: Collection[str]) -> bool:
    """True when `host` is one of `patterns`: an exact name, or any name below `example.org` for
    `*.example.org`.
    """
    name = host.casefold().rstrip(".")
    return any(name.endswith(p[1:]) if p.startswith("*.") else name == p for p in (p.casefold() for p in patterns))


def mirror_base(url: str) -> SplitResult:
    """Parse a `--mirror` address.

    Raises:
        UsageError: it is not an http or https address of a host.
    """
    try:
        base = urlsplit(url)
        usable = base.scheme in ("http", "https") and bool(base.hostname) and (base.port or 1) > 0
    except ValueError:
        usable, base = False, urlsplit("")
    if not usable or base.username is not None or base.query or base.fragment:
        raise UsageError(
            f"{url!r} cannot be used as a mirror",
            why="a mirror is an http or https address such as http://127.0.0.1:8000",
            fix="give --mirror SCHEME://HOST[:PORT]",
        )
    return base


def split(url: str, chain: Sequence[str]) -> SplitResult:
    """`urlsplit` with the port checked. Raises NetworkError, naming the chain."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise refusal([*chain, url], f"not a valid address ({error})") from None
    return parts


def check(parts: SplitResult, chain: Sequence[str], url: str, hosts: Collection[str]) -> None:
    """Refuse an address unless it is plain https at one of `hosts`. Raises NetworkError, naming the chain."""
    host = parts.hostname or ""
    if parts.scheme != "https":
        raise refusal([*chain, url], "only https is allowed")
    if parts.username is not None or parts.port not in (None, 443):
        raise refusal([*chain, url], "an address with a user name or an unusual port is not allowed")
    if not host_matches(host, hosts):
        raise refusal([*chain, url], f"{host or 'no host'} is not among {', '.join(sorted(hosts)) or 'no host at all'}")


def origin(parts: SplitResult) -> tuple[str, str, int]:
    """Scheme, host and port, the port written out."""
    return (
        parts.scheme,
        (parts.hostname or "").casefold(),
        parts.port or (443 if parts.scheme == "https" else 80),
    )


def arrows(chain: Collection[str]) -> str:
    """A chain of addresses for people."""
    return " -> ".join(chain)


def refusal(chain: Sequence[str], why: str) -> NetworkError:
    """The error for an address that the rules forbid."""
    return NetworkError(
        "the address is not permitted",
        why=f"{why}: {arrows(chain)}",
        fix="correct `url` in sources.toml, or name a base that you trust with --mirror",
        where=arrows(chain),
        code="address-refused",
    )


def failure(chain: Collection[str], why: str) -> NetworkError:
    """The error for a download that did not come to an end."""
    return NetworkError(
        "the download failed",
        why=f"{why}: {arrows(chain)}",
        fix="check the connection and run the same command again: it goes on where it stopped",
        where=arrows(chain),
    )
