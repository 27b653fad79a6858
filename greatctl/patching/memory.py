"""How many cells go through the model at once.

The estimate counts what the largest moment of a batch holds for one cell: the stream and the inside of the
MLP for its positions, the scores where a pattern is looked into, and several copies of one row of logits.
It may be wrong on another machine, so a batch that does not fit after all is halved while the sweep runs.
"""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["auto_cells", "free_bytes", "is_out_of_memory", "overhead_of", "tokens_at_once"]

_SHARE = 0.4  # of the free memory
_COPIES_OF_LOGITS = 8  # as the model gives them, widened, and what the metrics make of them
_MOST_TOKENS = {"cpu": 4096, "cuda": 65_536}  # more at once is not faster
_MOST_CELLS = 1024
_OVERHEAD = {"cpu": 32, "cuda": 288}  # what starting a batch costs, in tokens


def auto_cells(model: Any, length: int, *, pattern: bool = False, continued: int = 1) -> int:
    """Cells a batch for prompts of `length` positions.

    Args:
        model: the frozen model; its sizes and its device count.
        length: positions of the longest run.
        pattern: whether attention patterns are computed explicitly.
        continued: logits a run that count (more than 1 where answers have several tokens).
    """
    size = torch.empty(0, dtype=getattr(model, "dtype", torch.float32)).element_size()
    width = int(getattr(model, "d_model", 1024))
    inside = int(getattr(model, "d_mlp", 0) or 4 * width)
    heads = int(getattr(model, "n_heads", 0) or width // 64)
    cell = length * (8 * width + 3 * inside) * size
    cell += (length if continued > 1 else 1) * int(getattr(model, "d_vocab", 0)) * 4 * _COPIES_OF_LOGITS
    cell += 4 * heads * length * length * size if pattern else 0
    tokens = tokens_at_once(model.device)
    return max(1, min(int(_SHARE * free_bytes(model.device)) // cell, tokens // length, _MOST_CELLS))


def tokens_at_once(device: torch.device | str) -> int:
    """The most tokens that go through a block together; more at once is not faster."""
    return _MOST_TOKENS.get(torch.device(device).type, _MOST_TOKENS["cpu"])


def overhead_of(device: torch.device | str) -> int:
    """What a batch costs besides its tokens, in tokens."""
    return _OVERHEAD.get(torch.device(device).type, _OVERHEAD["cpu"])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted; the CPU's allocator has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_bytes(device: torch.device | str) -> int:
    """Bytes that are free on the device; 2 GiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2 << 30
