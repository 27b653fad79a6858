"""Example plugin: a patching metric, `reciprocal-rank`.

    greatctl --plugin plugins/reciprocal_rank.py patch --metric reciprocal-rank

1 where the answer is the model's first choice, 1/2 where it is the second, and so on. Unlike `logit-diff` it
asks nothing about a wrong answer, and unlike `prob` it does not care how sure the model is.

What to notice:
* A metric is a class with three facts and `__call__`. One number comes out per example: never a mean. The
  host normalises against the clean and the corrupted run, bootstraps and reports.
* A pair may have several right answers: `answers.right` holds them all, padded with -1. `answers.answer` is
  the first of them.
* `differentiable = False`: counting has no gradient, so methods that need one cannot use this metric.
* torch is imported for type checkers only. This file is run for every command, and tensors bring their
  methods along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from greatctl import hookimpl

if TYPE_CHECKING:
    import torch

    from greatctl.extend.contracts import Answers
    from greatctl.extend.hookspecs import Register

__version__ = "1.0"


class ReciprocalRank:
    """1 / (1 + the number of tokens whose logit is above the answer's); ties count in the answer's favour."""

    name: ClassVar[str] = "reciprocal-rank"
    unit: ClassVar[str] = "1/rank"
    differentiable: ClassVar[bool] = False

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        each = logits.gather(-1, answers.right.clamp_min(0))
        best = each.masked_fill(answers.right < 0, float("-inf")).amax(-1, keepdim=True)
        return 1.0 / (1 + (logits > best).sum(-1))


@hookimpl
def register_metrics(register: Register) -> None:
    """The class itself: nothing heavy is imported by it."""
    register("reciprocal-rank", ReciprocalRank)
