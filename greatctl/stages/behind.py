"""Work that goes on behind the main thread, one piece at a time and in order.

Writing a shard (copying, hashing, waiting for the disk) takes about as long as computing the next one; done behind, it
costs nothing. At most one piece waits or runs while the next is prepared, so memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

__all__ = ["Behind"]


class Behind:
    """`with Behind() as behind: behind.put(work)`. Leaving waits; an error of a piece is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "behind")
        self._last: Future[object] | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Start `work` once the piece before it is done."""
        self.wait()
        self._last = self._pool.submit(work)

    def wait(self) -> None:
        """Until the piece that was put last is done; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()  # what was begun is finished, also on the way out of an error
        if error is None:
            self.wait()
