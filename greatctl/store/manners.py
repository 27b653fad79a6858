"""When to ask a host again, and when to leave it alone.

Pure bookkeeping with the clock handed in: a pause between two requests to one host, growing waits after
passing failures, a server's own Retry-After obeyed, and a host that cannot be reached asked no more in this
run.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["GiveUp", "Manners", "Passing", "retry_after"]

_LONGEST_BACKOFF = 60.0


class Passing(Exception):
    """A failure that may pass; `after` seconds is what the server asked for, `unreachable` = no connection
    came about.
    """

    def __init__(self, why: str, after: float = 0.0, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.after = after
        self.unreachable = unreachable


class GiveUp(Exception):
    """No further attempt; the text says why."""


class Manners:
    """One run's behaviour towards hosts.

    Args:
        pace: seconds between the beginnings of two requests to one host.
        attempts: failures in a row, without progress in between, that are too many.
        longest_wait: a Retry-After beyond this many seconds ends the download instead.
    """

    def __init__(
        self,
        pace: float,
        attempts: int,
        longest_wait: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.clock = clock
        self._pace, self._attempts, self._longest_wait, self._sleep = pace, attempts, longest_wait, sleep
        self._last: dict[str, float] = {}
        self._down: dict[str, str] = {}

    def before(self, host: str) -> None:
        """Wait for this host's turn.

        Raises:
            GiveUp: the host was found unreachable earlier.
        """
        if host in self._down:
            raise GiveUp(self._down[host])
        if host in self._last:
            wait = self._last[host] + self._pace - self.clock()
            if wait > 0:
                self._sleep(wait)
        self._last[host] = self.clock()

    def down(self, host: str, why: str) -> None:
        """Ask this host no more."""
        self._down[host] = why

    def after(self, failure: Passing, host: str, failures: int, end: float) -> None:
        """Wait as long as the `failures`-th failure in a row deserves.

        Raises:
            GiveUp: too many, too long a wait, or it would go beyond the moment `end`.
        """
        if failures >= self._attempts:
            if failure.unreachable:
                self.down(host, str(failure))
            raise GiveUp(f"{failure} ({failures} attempts)")
        if failure.after > self._longest_wait:
            raise GiveUp(f"{failure}: the server asks to wait {failure.after:,.0f} s")
        wait = max(failure.after, min(_LONGEST_BACKOFF, 2.0 ** (failures - 1)))
        if self.clock() + wait > end:
            raise GiveUp(f"{failure}; no time is left for another attempt, what came is kept")
        self._sleep(wait)


def retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header: a number or a date; 0 when absent or unreadable."""
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
