"""The built-in metrics: logits at the answer position in, one number an example out.

`logit-diff` comes first because it is linear in the logits, so negative contributions stay visible;
probabilities hide them. `kl` and `js` need no answer: they compare whole next-token distributions with the
clean run's. Each class is a `PatchMetric`; the host normalises, bootstraps and reports, and none of these
reduces over examples. `measure` is the gate that every metric, built in or from a plugin, passes through.

Every docstring says which way is up. Of a set of answers the logits count as their log-sum-exp and the
probabilities as their sum. Where answers have several tokens, the host hands over the sums over their tokens
(`Answers.sequence`); only `rank`, `kl` and `js` then speak of the first of these tokens alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from ..errors import PluginError

if TYPE_CHECKING:
    from ..extend.contracts import Answers, PatchMetric

__all__ = [
    "CE",
    "JS",
    "KL",
    "Accuracy",
    "LogProb",
    "Logit",
    "LogitDiff",
    "Prob",
    "ProbDiff",
    "Rank",
    "measure",
]


class LogitDiff:
    """Logit of the answer minus logit of the wrong answer; larger where the model leans to the answer."""

    name: ClassVar[str] = "logit-diff"
    unit: ClassVar[str] = "logits"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        right, wrong = _logits(logits, answers)
        return right - wrong


class Logit:
    """Logit of the answer; larger where the model leans to it, or where all logits are larger."""

    name: ClassVar[str] = "logit"
    unit: ClassVar[str] = "logits"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        return _logits(logits, answers)[0]


class Prob:
    """Probability of the answer; larger where the model leans to it."""

    name: ClassVar[str] = "prob"
    unit: ClassVar[str] = "probability"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        return _log_probs(logits, answers)[0].exp()


class ProbDiff:
    """Probability of the answer minus that of the wrong answer, -1 to 1; larger where the model leans to the
    answer.
    """

    name: ClassVar[str] = "prob-diff"
    unit: ClassVar[str] = "probability"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        right, wrong = _log_probs(logits, answers)
        return right.exp() - wrong.exp()


class LogProb:
    """Logarithm of the answer's probability, at most 0; larger where the model leans to the answer."""

    name: ClassVar[str] = "log-prob"
    unit: ClassVar[str] = "nats"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        return _log_probs(logits, answers)[0]


class CE:
    """Cross-entropy of the answer, `log-prob` with the sign of a loss; smaller where the model leans to the
    answer.
    """

    name: ClassVar[str] = "ce"
    unit: ClassVar[str] = "nats"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        return -_log_probs(logits, answers)[0]


class KL:
    """KL divergence of the patched next-token distribution from the clean one, KL(clean || patched).

    0 at the clean run and larger the farther the patched run is from it, so its normalised effect reads like
    the others'.
    """

    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        return _divergence(answers.clean_logits.log_softmax(-1), logits.log_softmax(-1))


class JS:
    """Jensen-Shannon divergence of the patched and the clean next-token distribution, 0 to log 2 (Lin 1991).

    0 at the clean run and larger the farther the patched run is from it. Bounded where `kl` runs away.
    """

    name: ClassVar[str] = "js"
    unit: ClassVar[str] = "nats"
    differentiable: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        clean, patched = answers.clean_logits.log_softmax(-1), logits.log_softmax(-1)
        middle = torch.logaddexp(clean, patched) - torch.tensor(2.0).log().item()
        return (_divergence(clean, middle) + _divergence(patched, middle)) / 2


class Rank:
    """Rank of the answer among all tokens: 1 for the model's first choice; smaller is better.

    One more than the number of tokens with a larger logit; of a set the best counts. Ties count in the
    answer's favour.
    """

    name: ClassVar[str] = "rank"
    unit: ClassVar[str] = "rank"
    differentiable: ClassVar[bool] = False

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        best = _of_set(logits, answers.right).amax(-1, keepdim=True)
        return 1 + (logits > best).sum(-1).to(torch.promote_types(logits.dtype, torch.float32))


class Accuracy:
    """1 where the answer is likelier than the wrong answer, 0 where it is less likely, 1/2 at a tie.

    Chance is 1/2. Whether the answer is the likeliest of all tokens is what `rank` tells.
    """

    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share right"
    differentiable: ClassVar[bool] = False

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """[n] of logits [n, d_vocab]."""
        right, wrong = _log_probs(logits, answers) if answers.sequence else _logits(logits, answers)
        return ((right > wrong).to(right.dtype) + (right >= wrong).to(right.dtype)) / 2


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


def _logits(logits: torch.Tensor, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n] of the right and of the wrong answers."""
    if answers.sequence:
        return answers.sequence.right_logit, answers.sequence.wrong_logit
    return _joined(logits, answers.right), _joined(logits, answers.wrong)


def _log_probs(logits: torch.Tensor, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [n] of the right and of the wrong answers."""
    if answers.sequence:
        return answers.sequence.right_log_prob, answers.sequence.wrong_log_prob
    log_probs = logits.log_softmax(-1)
    return _joined(log_probs, answers.right), _joined(log_probs, answers.wrong)


def _joined(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log-sum-exp [n] over a set; of one token its value to the bit."""
    found = _of_set(values, tokens)
    return found[:, 0] if found.shape[1] == 1 else found.logsumexp(-1)


def _of_set(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """values[i, tokens[i, j]] [n, s]; -inf where `tokens` is padded with -1."""
    return values.gather(-1, tokens.clamp_min(0)).masked_fill(tokens < 0, -torch.inf)


def _divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first || second) [n] of log-probabilities [n, d_vocab]; tokens that `first` rules out count 0."""
    probability = first.exp()
    possible = probability > 0
    gap = torch.where(possible, first, 0.0) - torch.where(possible, second, 0.0)
    return (probability * gap).sum(-1)


def _broken(name: str, why: str) -> PluginError:
    return PluginError(
        f"the metric {name!r} broke its contract",
        why=f"PatchMetric: logits [n, d_vocab] in, n finite numbers out; {why}",
        fix="mend the plugin, or use another --metric; greatctl.extend.testing has the checks",
        code="metric-contract",
    )
