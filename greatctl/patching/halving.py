"""Work cut into parts that fit into memory, and cut again where one does not fit after all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ResourceError
from .memory import auto_cells, is_out_of_memory

__all__ = ["Halving", "forked_cells"]

_COPIES = 4  # of the forked stream: forked, edited, normed in float32, normed


class Halving:
    """Runs work of n parts, `most` at once; half as many from then on whenever that is too much.

    Args:
        most: parts at once.
        device: named in errors.
        said: told when the limit is halved.
    """

    def __init__(self, most: int, device: object, said: Callable[[str], None] = lambda words: None) -> None:
        self.most, self._device, self._said = max(1, most), device, said

    def each(self, n: int, work: Callable[[int, int], None]) -> None:
        """`work(begin, end)` over 0 … n, once for each part; a part that did not fit is begun again.

        Raises:
            ResourceError: not even one part fits.
        """
        begin = 0
        while begin < n:
            end = min(n, begin + self.most)
            try:
                work(begin, end)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(end - begin, error)
                continue
            begin = end

    def _halve(self, parts: int, error: BaseException) -> None:
        if parts == 1:
            raise ResourceError(
                f"one run does not fit into the memory of {self._device}",
                why=str(error).splitlines()[0],
                fix="use shorter prompts, a smaller --model, or another --device",
                code="out-of-memory",
            ) from error
        self.most = max(1, parts // 2)
        self._said(f"{parts} runs do not fit into memory; going on with {self.most} at once")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def forked_cells(model: Any, length: int, streams: int) -> int:
    """Like `auto_cells`, where the widest moment holds the stream `streams` times."""
    inside = int(model.d_mlp) * 3 + 8 * int(model.d_model)
    return max(1, int(auto_cells(model, length) * inside / (inside + _COPIES * streams * int(model.d_model))))
