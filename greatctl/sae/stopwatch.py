"""Seconds that pass on the device between two points of a loop, without making the CPU wait for it.

On a CPU this is a clock. On a GPU the CPU runs ahead of the work that it asked for, so a clock would measure nothing;
there, two events go into the device's queue, and the time between them is read later, when both have long passed.
Between the last kernel of a step and the arrival of the next batch that time is what the device stood idle.
"""

from __future__ import annotations

import time
from collections import deque

import torch

__all__ = ["Stopwatch"]

_PENDING = 64  # pairs of events kept before the oldest are read


class Stopwatch:
    """`with watch: …` as often as needed, then `watch.seconds()`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._total, self._began = 0.0, 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._start: torch.cuda.Event | None = None

    def __enter__(self) -> Stopwatch:
        if self._cuda:
            self._start = self._event()
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self._start is None:
            self._total += time.perf_counter() - self._began
            return
        self._pairs.append((self._start, self._event()))
        while len(self._pairs) > _PENDING and self._pairs[0][1].query():
            self._read()

    def seconds(self) -> float:
        """All of it; waits for the device."""
        while self._pairs:
            self._pairs[0][1].synchronize()
            self._read()
        return self._total

    def _read(self) -> None:
        start, end = self._pairs.popleft()
        self._total += start.elapsed_time(end) / 1000

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
