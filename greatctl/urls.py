"""Which web addresses a manifest may name.

A manifest can come from a stranger, and greatctl fetches what it says. So an address must be http or https,
and its host must be a public one: no loopback, no private network, no cloud metadata service, however the
number is spelt (`2130706433`, `0x7f.1` and `[::ffff:7f00:1]` are all this machine). What a name resolves to
is checked at connect time by `greatctl.store`; this is the check that needs no network.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

__all__ = ["url_problem"]

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?\.?")
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def url_problem(url: str) -> str | None:
    """Why `url` may not be fetched, or None when it may."""
    if any(c.isspace() or not c.isprintable() or c == "\\" for c in url):
        return "it holds blanks, backslashes or invisible characters"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"it is not a URL ({error})"
    if parts.scheme.lower() not in ("http", "https"):
        return f"its scheme is {parts.scheme or 'missing'!r}; only http and https are allowed"
    if not host:
        return "it names no host"
    if "@" in parts.netloc:
        return "it carries a user name or password"
    return _host_problem(host)


def _host_problem(host: str) -> str | None:
    address = _address(host)
    if address is not None:
        return None if _is_public(address) else f"{host} is a private or local address"
    if not _HOST.fullmatch(host):
        return "its host is not a plain ASCII name (write international names in their xn-- form)"
    name = host.rstrip(".").lower()
    if "." not in name or name.endswith(_PRIVATE_SUFFIXES):
        return f"{name} is a local name"
    if re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)", name.rsplit(".", 1)[-1]):
        return f"{name} looks like a number, but is no address"
    return None


def _address(host: str) -> _Address | None:
    """The IP address that a host spells, in any of the forms that resolvers take, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return _legacy_ipv4(host)


def _legacy_ipv4(host: str) -> ipaddress.IPv4Address | None:
    """One to four parts, each decimal, octal (0…) or hexadecimal (0x…); the last fills the bytes left."""
    parts = host.rstrip(".").split(".")
    numbers: list[int] = []
    for part in parts:
        base = 16 if part.lower().startswith("0x") else 8 if part.startswith("0") and len(part) > 1 else 10
        try:
            numbers.append(int(part, base))
        except ValueError:
            return None
    if len(numbers) > 4 or any(n > 255 for n in numbers[:-1]) or numbers[-1] >= 256 ** (5 - len(numbers)):
        return None
    value = numbers[-1] + sum(n << (24 - 8 * place) for place, n in enumerate(numbers[:-1]))
    return ipaddress.IPv4Address(value)


def _is_public(address: _Address) -> bool:
    """Global, and so is any IPv4 address that an IPv6 one carries inside."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in ipaddress.IPv6Network("64:ff9b::/96"):
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not address.is_multicast
