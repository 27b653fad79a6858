"""The metrics mean what they say: one number an example, sets, several tokens, extreme logits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from greatctl.extend.contracts import Answers, SequenceScores
from greatctl.extend.manager import load_plugins
from greatctl.patching.answers import answers_of, either, sequence_scores
from greatctl.patching.metrics import JS, KL, Accuracy, LogitDiff, LogProb, Prob, Rank, measure
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.reference import pairs_path

NAMES = ("logit-diff", "logit", "prob", "prob-diff", "log-prob", "kl", "js", "rank", "accuracy", "ce")
PLUGIN = Path(__file__).parent.parent / "plugins" / "reciprocal_rank.py"
REGISTRY = load_plugins(folder=None, enabled=False).registry


def metric(name: str):
    return REGISTRY.get("metrics", name)()


def given(n: int = 4, vocabulary: int = 9) -> tuple[torch.Tensor, Answers]:
    g = torch.Generator().manual_seed(0)
    logits, clean, corrupted = (2 * torch.randn(n, vocabulary, generator=g) for _ in range(3))
    return logits, Answers(torch.arange(n), torch.arange(n) + 4, clean, corrupted)


def by_hand(name: str, logits: list[float], clean: list[float], right: list[int], wrong: list[int]) -> float:
    """Each metric from its definition, in plain Python and float64."""

    def softmax(values: list[float]) -> list[float]:
        top = max(values)
        e = [math.exp(v - top) for v in values]
        return [v / sum(e) for v in e]

    p, q = softmax(logits), softmax(clean)
    good, bad = (math.log(sum(math.exp(logits[t]) for t in some)) for some in (right, wrong))
    pr, pw = (sum(p[t] for t in some) for some in (right, wrong))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return {
        "logit-diff": good - bad,
        "logit": good,
        "prob": pr,
        "prob-diff": pr - pw,
        "log-prob": math.log(pr),
        "ce": -math.log(pr),
        "kl": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
        "js": sum(v * math.log(v / m) for some in (p, q) for v, m in zip(some, middle, strict=True)) / 2,
        "rank": 1.0 + sum(v > max(logits[t] for t in right) for v in logits),
        "accuracy": float(good > bad),
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sets", [False, True])
def test_each_metric_is_its_definition_for_single_answers_and_for_sets(name, sets):
    logits, answers = given()
    right, wrong = [[0], [1], [2], [3]], [[4], [5], [6], [7]]
    if sets:
        right, wrong = [[0, 8], [1], [2, 5, 8], [3]], [[4], [5, 6], [6], [7, 1]]
        padded = [torch.tensor([r + [-1] * (3 - len(r)) for r in rows]) for rows in (right, wrong)]
        answers = Answers(answers.answer, answers.wrong_answer, answers.clean_logits, answers.corrupted_logits, *padded)
    found = measure(name, metric(name), logits, answers)
    for i in range(4):
        wanted = by_hand(name, logits[i].tolist(), answers.clean_logits[i].tolist(), right[i], wrong[i])
        assert found[i] == pytest.approx(wanted, abs=1e-5)


def test_the_built_in_metrics_are_registered_by_name():
    assert set(NAMES) <= set(REGISTRY.names("metrics"))
    assert all(metric(name).name == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_without_any_doubt_give_finite_numbers_and_gradients(name):
    _, answers = given()
    for size in (1e4, 1e8):
        for token in (0, 4):
            logits = torch.full((4, 9), -size)
            logits[:, token] = size
            for clean in (answers.clean_logits, logits, -logits):
                measured = logits.clone().requires_grad_()
                value = metric(name)(measured, Answers(answers.answer, answers.wrong_answer, clean, clean))
                assert torch.isfinite(value).all(), (name, size)
                if metric(name).differentiable:
                    (gradient,) = torch.autograd.grad(value.sum(), measured)
                    assert torch.isfinite(gradient).all(), (name, size)


@pytest.mark.parametrize("name", ["kl", "js", "prob", "rank", "accuracy", "logit-diff"])
def test_tokens_that_a_model_rules_out_are_no_reason_for_nan(name):
    logits, answers = given()
    clean = answers.clean_logits.clone()
    logits[:, 8], clean[:, 8] = -math.inf, -math.inf
    found = measure(name, metric(name), logits, Answers(answers.answer, answers.wrong_answer, clean, clean))
    assert found.isfinite().all()


def test_divergences_are_zero_at_the_clean_run_and_js_is_bounded():
    logits, answers = given()
    for one in (KL(), JS()):
        assert measure(one.name, one, answers.clean_logits, answers).abs().max() < 1e-6
    assert measure("js", JS(), logits, answers).min() > 0
    far = torch.full((4, 9), -1e4)
    far[:, 8] = 1e4
    near = Answers(answers.answer, answers.wrong_answer, far.roll(1, dims=1), far)
    assert torch.allclose(measure("js", JS(), far, near), torch.tensor(math.log(2)).double(), atol=1e-6)


def test_accuracy_counts_a_tie_as_chance_and_rank_in_the_answers_favour():
    _, answers = given()
    assert measure("accuracy", Accuracy(), torch.zeros(4, 9), answers).tolist() == [0.5] * 4
    assert measure("rank", Rank(), torch.zeros(4, 9), answers).tolist() == [1.0] * 4


def test_scores_of_several_tokens_are_sums_over_the_answers_own_tokens():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 7, generator=g)
    targets = torch.tensor([[1, 2, 3], [4, -1, -1]])
    sums, log_probs = sequence_scores(logits, targets)
    p = logits.log_softmax(-1)
    assert sums.tolist() == pytest.approx(
        [float(logits[0, 0, 1] + logits[0, 1, 2] + logits[0, 2, 3]), float(logits[1, 0, 4])]
    )
    assert log_probs.tolist() == pytest.approx([float(p[0, 0, 1] + p[0, 1, 2] + p[0, 2, 3]), float(p[1, 0, 4])])
    total = torch.stack(
        [sequence_scores(logits[:1, :2], torch.tensor([[a, b]]))[1].exp() for a in range(7) for b in range(7)]
    )
    assert total.sum() == pytest.approx(1.0, abs=1e-5)  # all texts of two tokens: a distribution
    assert torch.isfinite(sequence_scores(logits * 1e6, targets)[1]).all()


def test_a_set_of_texts_counts_as_the_sum_of_their_probabilities():
    scores = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -math.inf])]
    assert either(scores).exp().tolist() == pytest.approx([math.exp(-1) + math.exp(-3), math.exp(-2)])


def test_metrics_of_answers_of_several_tokens_use_the_hosts_sums():
    logits, answers = given()
    column = torch.linspace(-4, -1, 4)
    scores = SequenceScores(column + 9, column, column / 2, column)
    several = Answers(
        answers.answer, answers.wrong_answer, answers.clean_logits, answers.corrupted_logits, sequence=scores
    )
    assert LogitDiff()(logits, several).tolist() == pytest.approx([9.0] * 4)
    assert torch.equal(LogProb()(logits, several), column / 2)
    assert torch.equal(Prob()(logits, several), (column / 2).exp())
    assert Accuracy()(logits, several).tolist() == [1.0] * 4
    assert torch.equal(KL()(logits, several), KL()(logits, answers))
    picked = several.rows(torch.tensor([3, 0]))
    assert picked.answer.tolist() == [3, 0] and picked.sequence is not None
    assert LogProb()(logits[[3, 0]], picked).tolist() == pytest.approx([-0.5, -2.0])


def test_answers_of_pairs_hold_padded_sets_of_first_tokens():
    texts = Pair("a", "", "", "", "")
    one = EncodedPair(texts, (1, 2), (1, 3), 7, 8)
    more = EncodedPair(texts, (1, 2), (1, 3), 5, 6, answers=((5, 9), (4,), (5, 3)), wrong_answers=((6,),))
    logits = torch.zeros(2, 12)
    found = answers_of([one, more], logits, logits)
    assert found.right.tolist() == [[7, -1], [5, 4]] and found.wrong.tolist() == [[8], [6]]
    assert found.answer.tolist() == [7, 5] and found.sequence is None
    assert one.plain and not more.plain


def test_the_shipped_plugin_is_used_by_name_from_the_command_line(greatctl, tmp_path):
    """And it is short: at most thirty lines of code."""
    code = [
        line
        for line in re.sub(r'""".*?"""', "", PLUGIN.read_text(), flags=re.S).splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) <= 30
    few = "[[pair]]".join(Path(pairs_path("greatness")).read_text().split("[[pair]]")[:5])
    (tmp_path / "few.toml").write_text(few)
    done = greatctl(
        "--plugin", PLUGIN, "patch", "--model", "bundled", "--metric", "reciprocal-rank", "--metric", "prob",
        "--pairs", "few.toml", "--direction", "denoising", "--min-gap", "0", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = done.document["summary"]
    assert summary["metric"] == "reciprocal-rank" and set(summary["metrics"]) == {"reciprocal-rank", "prob"}
    assert 0 < summary["clean"] <= 1 and 0 < summary["corrupted"] <= 1
