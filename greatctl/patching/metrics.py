"""The built-in metrics: logits at the answer position in, one number an example out.

`logit-diff` comes first because it is linear in the logits, so negative contributions stay visible;
probabilities hide them. `kl` needs no answer: it compares whole next-token distributions. Each class is a
`PatchMetric`; the host normalises, bootstraps and reports, and none of these reduces over examples.
`measure` is the gate that every metric, built in or from a plugin, passes through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from ..errors import PluginError

if TYPE_CHECKING:
    from ..extend.contracts import Answers, PatchMetric

__all__ = ["KL", "LogitDiff", "Prob", "ProbDiff", "measure"]


class LogitDiff:
    """Logit of the answer minus logit of the wrong answer."""

    name: ClassVar[str] = "logit-diff"
    unit: ClassVar[str] = "logits"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        return _at(logits, answers.answer) - _at(logits, answers.wrong_answer)


class Prob:
    """Probability of the answer."""

    name: ClassVar[str] = "prob"
    unit: ClassVar[str] = "probability"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        return _at(logits.softmax(-1), answers.answer)


class ProbDiff:
    """Probability of the answer minus probability of the wrong answer."""

    name: ClassVar[str] = "prob-diff"
    unit: ClassVar[str] = "probability"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        probability = logits.softmax(-1)
        return _at(probability, answers.answer) - _at(probability, answers.wrong_answer)


class KL:
    """KL divergence of the patched next-token distribution from the clean one, KL(clean || patched).

    0 at the clean run and largest where the patch is far from it, so its normalised effect reads like the
    others'.
    """

    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        clean, patched = answers.clean_logits.log_softmax(-1), logits.log_softmax(-1)
        return torch.nn.functional.kl_div(patched, clean, reduction="none", log_target=True).sum(-1)


def measure(name: str, metric: PatchMetric, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
    """The metric of each example, float64 on the CPU, held against its contract.

    Raises:
        PluginError: it failed, reduced over examples, or gave something that is not a finite number.
    """
    try:
        value = metric(logits, answers)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise _broken(name, f"it raised {type(error).__name__}: {error}") from error
    if not isinstance(value, torch.Tensor):
        raise _broken(name, f"it returned {value!r:.60}, not a tensor")
    if value.shape != (len(logits),):
        raise _broken(name, f"it returned shape {list(value.shape)} for {len(logits)} examples")
    value = value.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).nonzero()[0])
        raise _broken(name, f"it returned {value[bad].item()} for example {bad}")
    return value


def _at(values: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """values[i, token[i]] for every row i."""
    return values.gather(-1, token[:, None])[:, 0]


def _broken(name: str, why: str) -> PluginError:
    return PluginError(
        f"the metric {name!r} broke its contract",
        why=f"PatchMetric: logits [n, d_vocab] in, n finite numbers out; {why}",
        fix="mend the plugin, or use another --metric; greatctl.extend.testing has the checks",
        code="metric-contract",
    )
