"""The conformance checks of a patching metric; `greatctl.extend.testing.check_metric` runs them.

They try what the sweep will do to it: batches of any make-up, runs that leave no doubt (logits of size 10^4),
sets of answers, and answers of several tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from . import contracts

__all__ = ["check"]


def check(metric: type[Any]) -> None:
    """All checks on six examples of eleven tokens. Raises AssertionError."""
    assert isinstance(metric.unit, str) and metric.unit, "its `unit` is no word"
    assert isinstance(metric.differentiable, bool), "its `differentiable` is not True or False"
    call: contracts.PatchMetric = metric()
    generator = torch.Generator().manual_seed(0)
    logits, clean, corrupted = (3 * torch.randn(6, 11, generator=generator) for _ in range(3))
    answers = contracts.Answers(torch.arange(6), torch.arange(6) + 5, clean, corrupted)
    kept = [t.clone() for t in (logits, clean, corrupted)]
    value = call(logits, answers)
    one_each = isinstance(value, torch.Tensor) and value.shape == (6,)
    assert one_each, "it does not give one number an example: shape [n]"
    finite = value.is_floating_point() and bool(torch.isfinite(value).all())
    assert finite, "it gives numbers that are not finite floats"
    assert torch.equal(value, call(logits, answers)), "it gives another value for the same logits"
    alone = torch.cat([call(logits[i : i + 1], answers.rows(slice(i, i + 1))) for i in range(6)])
    assert torch.allclose(value, alone, atol=1e-5), "an example's value depends on the others of the batch"
    as_clean = torch.equal(call(clean.clone(), answers), call(clean, answers))
    assert as_clean, "patched = clean does not give the clean value"
    same = zip(kept, (logits, clean, corrupted), strict=True)
    assert all(torch.equal(a, b) for a, b in same), "it changes the tensors that it is handed"
    _extremes(call, answers)
    _sets(call, logits, answers)
    if metric.differentiable:
        _differentiable(call, logits, answers)


def _extremes(call: contracts.PatchMetric, answers: contracts.Answers) -> None:
    shape = answers.clean_logits.shape
    peak = torch.full(shape, -1e4).scatter(1, answers.answer[:, None], 1e4)
    cases = {"equal logits": torch.zeros(shape), "a sure answer": peak, "a sure wrong answer": -peak}
    for what, logits in cases.items():
        for clean in (answers.clean_logits, peak, -peak):
            value = call(logits, dataclasses.replace(answers, clean_logits=clean))
            assert bool(torch.isfinite(value).all()), f"it is not finite for {what} (logits of size 10^4)"


def _sets(call: contracts.PatchMetric, logits: Tensor, answers: contracts.Answers) -> None:
    """Sets of answers are padded with -1, and answers of several tokens come with their scores."""
    second = (answers.answer + 4)[:, None] % logits.shape[1]
    second[::2] = -1
    sets = dataclasses.replace(answers, right=torch.cat([answers.right, second], 1))
    value = call(logits, sets)
    assert value.shape == (6,) and bool(torch.isfinite(value).all()), "it is not finite for a set of answers"
    more = torch.cat([sets.right, torch.full_like(second, -1)], 1)
    padded = call(logits, dataclasses.replace(sets, right=more))
    assert torch.allclose(value, padded), "padding (-1) in a set of answers changes its value"
    assert torch.allclose(value[::2], call(logits, answers)[::2]), "a set of one answer is not that answer"
    scores = contracts.SequenceScores(*(torch.linspace(-9.0, -1.0, 6) * i for i in (1, 2, 3, 4)))
    several = dataclasses.replace(sets, sequence=scores)
    value = call(logits, several)
    good = value.shape == (6,) and bool(torch.isfinite(value).all())
    assert good, "it is not one finite number an example where answers have several tokens"


def _differentiable(call: contracts.PatchMetric, logits: Tensor, answers: contracts.Answers) -> None:
    leaf = logits.clone().requires_grad_()
    value = call(leaf, answers)
    assert value.requires_grad, "it says that it is differentiable, but no gradient comes out"
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    useful = bool(torch.isfinite(gradient).all()) and bool(gradient.any())
    assert useful, "its gradient is not finite, or zero everywhere"
