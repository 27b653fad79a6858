"""Where a request really goes: to the address itself, or to the same path at a mirror; and which redirects follow.

A mirror swaps scheme and host of the first address. Its base alone, since a person typed it, may be plain http or a
private address; every other hop obeys the rules of a first address. Chains are told in their canonical form, so that
what is recorded does not depend on where the mirror stood.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from urllib.parse import urljoin, urlsplit

from ..errors import NetworkError
from .addresses import check, is_loopback, mirror_base, origin, split

__all__ = ["Route"]


class Route:
    """The way to a file.

    Args:
        mirror: base URL that replaces scheme and host of every first address; its path, if any, is put in front.
        trusted: a person named the mirror, so it may be a private address.
        offline: refuse everything.

    Attributes:
        local: the mirror is on this machine.
    """

    def __init__(self, mirror: str | None, *, trusted: bool, offline: bool) -> None:
        self._base = mirror_base(mirror) if mirror else None
        self._trusted, self._offline = trusted, offline
        self.local = self._base is not None and is_loopback(self._base.hostname or "")

    def first(self, url: str, chain: Sequence[str], hosts: Collection[str]) -> str:
        """The address to begin with: `url` itself, or its path at the mirror.

        Raises:
            NetworkError: `--offline` is on, or the address is not permitted.
        """
        if self._offline:
            raise NetworkError(
                "no connection was made",
                why="--offline is on",
                fix="run again without --offline",
                where=url,
                code="offline",
            )
        plain = split(url, chain)
        check(plain, chain, url, hosts)
        if self._base is None:
            return url
        query = f"?{plain.query}" if plain.query else ""
        return f"{self._prefix()}{plain.path}{query}"

    def next(self, here: str, location: str, chain: Sequence[str], hosts: Collection[str]) -> str:
        """A redirect's target, if it stays at the mirror or obeys the rules of a first address.

        Raises:
            NetworkError: it does neither.
        """
        split(location, chain)
        url = urljoin(here, location)
        parts = split(url, chain)
        if self._base is None or origin(parts) != origin(self._base):
            check(parts, chain, url, hosts)
        return parts._replace(fragment="").geturl()

    def canonical(self, url: str, chain: Sequence[str]) -> list[str]:
        """The chain of a request for `url` as it would read without the mirror."""
        if self._base is None:
            return list(chain)
        there = "https://" + urlsplit(url).netloc
        return [there + hop.removeprefix(self._prefix()) if hop.startswith(self._prefix()) else hop for hop in chain]

    def private_allowed(self, url: str) -> bool:
        """Whether a connection for `url` may go to a private address: only to a mirror that a person named."""
        return self._base is not None and self._trusted and origin(self._base) == origin(urlsplit(url))

    def _prefix(self) -> str:
        assert self._base is not None
        return f"{self._base.scheme}://{self._base.netloc}{self._base.path.rstrip('/')}"
