"""A batch that does not fit the memory, in parts, with the result of the whole.

When memory runs out the batch is cut into twice as many parts and tried again, and stays cut from then on. The
gradients of the parts add up to those of the whole batch (see `greatctl.sae.coder`), so learning rate, steps and
results stay what they were, up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ResourceError
from ..events import Run
from .coder import Coder

__all__ = ["Parts", "gradients", "memory_errors", "out_of_memory"]

SMALLEST = 16
_Value = TypeVar("_Value")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own type on an accelerator, a plain RuntimeError on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Parts:
    """Into how many parts a batch is cut.

    Attributes:
        count: grows by doubling, never shrinks.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.count = run, 1

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """`rows` in `count` parts of equal size, to one row."""
        return rows.tensor_split(min(self.count, rows.shape[0]))

    def attempt(self, work: Callable[[], _Value], undo: Callable[[], None], rows: int) -> _Value:
        """`work()`, and again with smaller parts for as long as memory runs out; `undo()` is called in between.

        Raises:
            ResourceError: parts of 16 rows do not fit either.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else "out of memory"
            undo()  # outside of the handler: the traceback holds on to the tensors that are to be freed
            self._halve(rows, reason)

    def _halve(self, rows: int, reason: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if -(-rows // self.count) <= SMALLEST:
            raise _too_large(f"a part of {-(-rows // self.count)} rows does not fit either: {reason}")
        self.count *= 2
        self.run.notice(
            f"train: memory ran out, so a batch of {rows:,} rows is worked through in {self.count} parts; "
            "the result stays the same"
        )


def gradients(
    coder: Coder, parts: Parts, x: Tensor, target: Tensor | None, *, dead: Tensor, step: int
) -> dict[str, Tensor]:
    """Backward passes of a batch's parts, whose gradients add up in the parameters.

    Args:
        x: [n, d_in]; target: [n, d_out], for coders that read one.
        dead: [d_sae] bool.

    Returns:
        The batch's loss terms, without their graphs.
    """
    pieces = parts.split(x)
    targets = None if target is None or not coder.reads_target else parts.split(target)
    more: dict[str, object] = {}
    if len(pieces) > 1 and not coder.separable:
        with torch.no_grad():
            more["shared"] = coder.prepare(pieces, dead=dead, targets=targets)
    terms: dict[str, Tensor] = {}
    for number, piece in enumerate(pieces):
        if targets is not None:
            more["target"] = targets[number]
        found = coder.losses(piece, dead=dead, step=step, **more)
        share = piece.shape[0] / x.shape[0]
        (torch.stack(tuple(found.values())).sum() * share).backward()
        for name, value in found.items():
            weighted = value.detach() * share
            terms[name] = terms[name] + weighted if name in terms else weighted
    return terms


@contextmanager
def memory_errors() -> Iterator[None]:
    """Memory that runs out in the body, where nothing smaller can be tried, is a ResourceError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _too_large(str(error).splitlines()[0] if str(error) else "out of memory") from error


def _too_large(why: str) -> ResourceError:
    return ResourceError(
        "the autoencoder does not fit the memory",
        why=why,
        fix="use fewer latents (--d-sae, --expansion), a smaller --batch-size, or a device with more memory",
        code="out-of-memory",
    )
