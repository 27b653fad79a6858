"""Batches on their way to the device.

On a CPU a batch is used where it is. For a GPU a thread gathers the next batches into page-locked memory while the
current one is worked on, and each is copied on a stream of its own one batch ahead, so that the copy runs beside the
computation and the GPU does not wait for the shuffle (or, when streaming, for the model). The thread draws from named
generators alone: order and content do not depend on it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from .rows import Batch

__all__ = ["feed"]

_AHEAD = 3
_POLL_SECONDS = 0.2


@contextmanager
def feed(stream: Iterator[Batch], device: torch.device) -> Iterator[Iterator[Batch]]:
    """`stream` with its tensors on `device`, as stored (no change of dtype). Errors of the stream come out of the
    iterator; the thread, where there is one, ends with the context.
    """
    if device.type != "cuda":
        yield ((cursor, x.to(device), None if y is None else y.to(device)) for cursor, x, y in stream)
        return
    stop = threading.Event()
    waiting: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_AHEAD)
    thread = threading.Thread(target=_gather, args=(stream, waiting, stop), name="greatctl-feed", daemon=True)
    thread.start()
    try:
        yield _Copied(waiting, device)
    finally:
        stop.set()
        thread.join()


def _gather(stream: Iterator[Batch], waiting: queue.Queue, stop: threading.Event) -> None:
    try:
        for cursor, x, y in stream:
            if not _put(waiting, (cursor, x.pin_memory(), None if y is None else y.pin_memory()), stop):
                return
    except BaseException as error:  # whatever it is, it belongs to whoever asks for the next batch
        _put(waiting, error, stop)


def _put(waiting: queue.Queue, item: object, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            waiting.put(item, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False


class _Copied:
    """Batches on the device. While one is worked on, the next is being copied, if it has been gathered by then."""

    def __init__(self, waiting: queue.Queue, device: torch.device) -> None:
        self._waiting, self._device = waiting, device
        self._stream = torch.cuda.Stream(device)
        self._coming: tuple[Batch, torch.cuda.Event] | BaseException | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._coming if self._coming is not None else self._begun(self._waiting.get())
        self._coming = None
        if isinstance(item, BaseException):
            raise item
        batch, copied = item
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for rows in batch[1:]:
            if rows is not None:
                rows.record_stream(current)  # its memory belongs to the copying stream
        with suppress(queue.Empty):
            self._coming = self._begun(self._waiting.get_nowait())
        return batch

    def _begun(self, item: Batch | BaseException) -> tuple[Batch, torch.cuda.Event] | BaseException:
        if isinstance(item, BaseException):
            return item
        cursor, x, y = item
        with torch.cuda.stream(self._stream):
            batch = cursor, _copied(x, self._device), None if y is None else _copied(y, self._device)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return batch, copied


def _copied(rows: Tensor, device: torch.device) -> Tensor:
    return rows.to(device, non_blocking=True)
