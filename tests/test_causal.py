"""Causal evidence: a latent that writes the answer is found, one that does not is not, and batches are single runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import context, make_project, save_tiny

from greatctl import model
from greatctl.errors import InputError
from greatctl.events import Event
from greatctl.features.causal import KINDS, REFERENCE, STRENGTHS, Outcomes, Readings, Trial, equal_firing, weigh
from greatctl.features.steering import random_directions
from greatctl.model.interface import FrozenModel, Intervention
from greatctl.patching.pair_files import Pair
from greatctl.patching.pairs import EncodedPair
from greatctl.sae.folder import LoadedSAE
from greatctl.stages.branches import Branch, Price
from greatctl.stages.causal import _apart, causal_evidence
from greatctl.stages.context import Context

LAST = "blocks.2.hook_resid_post"
WRITES, NULL = 0, 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    folder = tmp_path_factory.mktemp("causal")
    save_tiny(folder)
    return model.load(folder, name="tiny", device="cpu")


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return context(make_project(tmp_path, {}), "interpret")


def _pairs(n: int = 8, *, heldout: bool = True) -> list[Pair]:
    return [Pair(f"p{i}", f"He rose {i}", f"He rose {9 - i}", "!", "?", heldout=heldout) for i in range(n)]


def _text() -> torch.Tensor:
    return torch.randint(2, 320, (3, 20), generator=torch.Generator().manual_seed(4))


def _sae(tiny: FrozenModel, hook_point: str = LAST, target: str | None = None) -> LoadedSAE:
    """Latent 0 writes the answer over the wrong answer, latent 1 neither of them, and the others noise."""
    generator = torch.Generator().manual_seed(2)
    W_dec = torch.randn(12, 32, generator=generator)
    W_enc, offset = torch.randn(32, 12, generator=generator) / 4, torch.randn(32, generator=generator)
    right, wrong = (tiny.tokenizer(word)["input_ids"][-1] for word in "!?")
    eye = torch.eye(32)[:, None]
    unembedding = tiny.resume(tiny.n_layers, eye)[:, 0].T / 32**0.5  # the norm makes each row of length sqrt(32)
    W_dec[WRITES] = unembedding[right] - unembedding[wrong]
    for row in torch.linalg.qr(unembedding[[right, wrong]].T).Q.T:
        W_dec[NULL] -= (W_dec[NULL] @ row) * row

    def encode(x: torch.Tensor) -> torch.Tensor:
        return (x @ W_enc).relu()

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return latents @ W_dec + offset

    return LoadedSAE("planted", "relu", hook_point, target, 32, {}, W_dec, encode, decode, lambda x: decode(encode(x)))


def test_a_latent_that_writes_the_answer_beats_its_placebo_and_a_null_latent_does_not(
    tiny: FrozenModel, ctx: Context
) -> None:
    found, table = causal_evidence(ctx, tiny, _sae(tiny), [WRITES, NULL], _pairs(), windows=_text())
    planted, null = found[WRITES], found[NULL]
    assert planted["effect"] > planted["placebo"] > 0
    assert planted["dose"] == 1.0 and planted["slope"] > 0 and planted["low"] > 0
    assert planted["p_value"] == planted["floor"] == 2 / 2**8
    assert planted["placebo_p"] == 1 / 25
    assert abs(null["effect"]) < null["placebo"]
    assert planted["clamp"] > 0 and planted["n_pairs"] == 8
    assert planted["ablation"] > planted["ablation_placebo"], "what it writes is gone with it"
    kinds = set(table.column("kind").to_pylist())
    assert {*KINDS, "gap"} == kinds
    random = table.filter([kind == "random" for kind in table.column("kind").to_pylist()])
    assert random.num_rows == 24 * len(STRENGTHS) * 8


def test_the_complement_is_the_corrupted_prompt_with_the_latent_as_in_the_clean_one(
    tiny: FrozenModel, ctx: Context
) -> None:
    site = "blocks.1.hook_resid_post"
    sae, (right, wrong) = _sae(tiny, site), (tiny.tokenizer(word)["input_ids"][-1] for word in "!?")
    pairs = _pairs(3)
    ends = [tiny.capture(torch.tensor([model.encode(tiny.tokenizer, t)]), [site])[site][0, -1:]
            for t in (pairs[0].clean, pairs[0].corrupted)]  # fmt: skip
    latent = int((sae.encode(ends[0]) - sae.encode(ends[1])).abs().argmax())
    found, table = causal_evidence(ctx, tiny, sae, [latent], pairs, windows=_text(), n_random=3)
    way = random_directions(3, 32, 0)

    def kept(pair: Pair, draw: int | None) -> tuple[float, float]:
        clean, corrupted = (torch.tensor([model.encode(tiny.tokenizer, t)]) for t in (pair.clean, pair.corrupted))
        a, b = (sae.encode(tiny.capture(ids, [site])[site][0]) for ids in (clean, corrupted))
        mixed = b.clone()
        mixed[1:, latent] = a[1:, latent]
        delta = sae.decode(mixed) - sae.decode(b)
        if draw is not None:
            delta = (a - b)[:, latent, None] * sae.W_dec[latent].norm() * way[draw]
            delta[0] = 0
        change = Intervention(site, lambda value: value + delta)
        runs = [tiny.run(clean), tiny.run(corrupted), tiny.run(corrupted, [change])]
        m = [float(logits[0, -1, right] - logits[0, -1, wrong]) for logits in runs]
        return m[2] - m[1], m[0] - m[1]

    rows = {(r["kind"], r["draw"], r["pair"]): r["effect"] for r in table.to_pylist() if r["latent"] in (latent, -1)}
    for pair in pairs:
        effect, gap = kept(pair, None)
        assert rows["complement", 0, pair.id] == pytest.approx(effect, abs=2e-4)
        assert rows["gap", 0, pair.id] == pytest.approx(gap, abs=2e-4)
        assert rows["random-complement", 2, pair.id] == pytest.approx(kept(pair, 2)[0], abs=2e-4)
    effects, gaps = np.array([kept(pair, None) for pair in pairs]).T
    assert np.abs(effects).max() > 1e-3
    assert found[latent]["complement_gap"] == pytest.approx(gaps.mean(), abs=2e-4)


def test_a_latent_that_is_the_whole_difference_keeps_all_of_it_and_a_silent_one_nothing(
    tiny: FrozenModel, ctx: Context
) -> None:
    words = ("He rose 1", "He rose 8")
    last, logits = [], []
    for ids in (torch.tensor([model.encode(tiny.tokenizer, text)]) for text in words):
        last.append(tiny.capture(ids, [LAST])[LAST][0, -1])
        logits.append(tiny.run(ids)[0, -1])
    row = last[0] - last[1]
    letters = {letter: tiny.tokenizer(letter)["input_ids"][-1] for letter in "abcdefghijklmnopqrstuvwxyz"}
    raised = {letter: float((logits[0] - logits[1])[token]) for letter, token in letters.items()}
    right, wrong = max(raised, key=lambda x: raised[x]), min(raised, key=lambda x: raised[x])
    W_dec = torch.stack([row, row])

    def encode(x: torch.Tensor) -> torch.Tensor:
        """How far along the way from the corrupted to the clean activation; the other latent never fires."""
        along = (x - last[1]) @ row / row.square().sum()
        return torch.stack([along, torch.zeros_like(along)], dim=1)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return latents @ W_dec

    sae = LoadedSAE("whole", "relu", LAST, None, 32, {}, W_dec, encode, decode, lambda x: decode(encode(x)))
    pairs = [Pair("p", *words, right, wrong, heldout=True)]
    found, _ = causal_evidence(ctx, tiny, sae, [0, 1], pairs, windows=_text())
    assert found[0]["complement"] == pytest.approx(1.0, abs=1e-4)
    assert abs(found[0]["complement_placebo"]) < 1 and found[0]["complement_p"] == 1 / 25
    assert found[1]["complement"] == 0.0 and found[1]["complement_p"] == 1.0
    turned = [Pair("p", *words[::-1], right, wrong, heldout=True)]
    against, _ = causal_evidence(ctx, tiny, sae, [0], turned, windows=_text())
    assert against[0]["complement_gap"] < 0 and np.isnan(against[0]["complement"])


def test_places_without_a_counterpart_and_special_tokens_carry_nothing() -> None:
    acts = torch.arange(1.0, 11).view(2, 5, 1)
    where = torch.tensor([[False, True, True, True, True], [False, True, True, True, False]])
    pair = EncodedPair(_pairs(1)[0], (0, 5, 6, 7, 8), (0, 5, 9, 8), 1, 2, alignment=((0, 0), (1, 1), (4, 3)))
    apart = _apart(Readings(acts, where), [pair], 1)
    assert apart[..., 0].tolist() == [[0] * 5, [0, 2 - 7, 0, 5 - 9, 0]]


def test_the_damage_grows_with_the_strength(tiny: FrozenModel, ctx: Context) -> None:
    _, table = causal_evidence(ctx, tiny, _sae(tiny), [WRITES], _pairs(2), windows=_text(), n_random=2)
    kl = {r["strength"]: r["damage_kl"] for r in table.to_pylist() if r["kind"] == "steer"}
    values = [kl[strength] for strength in STRENGTHS]
    assert values == sorted(values) and values[0] > 0


@pytest.mark.parametrize("hook_point", ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_batches_of_trials_are_single_runs(tiny: FrozenModel, ctx: Context, hook_point: str) -> None:
    sae, pairs = _sae(tiny, hook_point), _pairs(2)
    peaks = {3: 2.5}
    _, table = causal_evidence(ctx, tiny, sae, [3], pairs, windows=_text(), peaks=peaks, n_random=1)
    norm = Branch(tiny, hook_point, _text()).norm
    right, wrong = (tiny.tokenizer(word)["input_ids"][-1] for word in "!?")
    row = sae.W_dec[3]

    def by_hand(kind: str, strength: float, text: str) -> float:
        tokens = torch.tensor([model.encode(tiny.tokenizer, text)])

        def edit(value: torch.Tensor) -> torch.Tensor:
            x, ordinary = value.flatten(2)[0], tokens[0] > 1
            acts = sae.encode(x)
            clamped = acts.clone()
            clamped[:, 3] = {"ablate": 0.0, "clamp": 2.5}.get(kind, 0.0)
            delta = sae.decode(clamped) - sae.decode(acts)
            if kind == "steer":
                delta = (strength * norm * row / row.norm()).expand_as(x)
            return (x + delta * ordinary[:, None]).view_as(value)

        last = torch.tensor([tokens.shape[1] - 1])
        before = tiny.run(tokens, positions=last)[0]
        after = tiny.run(tokens, [Intervention(hook_point, edit)], positions=last)[0]
        change = float((after[right] - after[wrong]) - (before[right] - before[wrong]))
        return -change if kind == "ablate" else change

    rows = {(r["kind"], r["strength"], r["pair"]): r["effect"] for r in table.to_pylist() if r["latent"] == 3}
    for kind, strength in (("ablate", 0.0), ("clamp", 2.5), ("steer", REFERENCE)):
        for pair in pairs:
            expected = np.mean([by_hand(kind, strength, text) for text in (pair.clean, pair.corrupted)])
            assert rows[kind, strength, pair.id] == pytest.approx(expected, abs=2e-4)


def test_the_price_is_what_a_plain_run_gives(tiny: FrozenModel) -> None:
    branch = Branch(tiny, LAST, _text())
    price, rows = Price(branch), torch.arange(3)
    kl, rise = price.of(rows, branch.value)
    assert kl.abs().max() < 1e-6 and rise.abs().max() < 1e-6
    logits = tiny.run(_text())[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), _text()[:, 1:].flatten())
    assert price.nats == pytest.approx(float(expected), abs=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_baselines_are_steered_along(tiny: FrozenModel, ctx: Context) -> None:
    sae = _sae(tiny)
    more = {"windows": _text(), "n_random": 3, "baselines": {"diff-means": sae.W_dec[WRITES]}}
    first, second = (causal_evidence(ctx, tiny, sae, [WRITES], _pairs(3), seed=5, **more) for _ in range(2))
    assert first[1].equals(second[1])
    np.testing.assert_equal(first[0], second[0])  # which takes a NaN for a NaN
    effect = {k: [r["effect"] for r in first[1].to_pylist() if r["kind"] == k] for k in ("steer", "diff-means")}
    assert effect["diff-means"] == pytest.approx(effect["steer"])


def test_pairs_that_are_not_held_out_are_left_alone(tiny: FrozenModel, tmp_path: Path) -> None:
    said: list[Event] = []
    ctx = context(make_project(tmp_path, {}), "interpret", emit=said.append)
    found, table = causal_evidence(ctx, tiny, _sae(tiny), [WRITES], _pairs(heldout=False), windows=_text())
    assert found == {} and table.num_rows == 0
    assert "held out" in said[-1].message
    found, _ = causal_evidence(
        ctx, tiny, _sae(tiny), [WRITES], _pairs(2, heldout=False), windows=_text(), held_out_only=False, n_random=1
    )
    assert found[WRITES]["n_pairs"] == 2


@pytest.mark.parametrize(
    ("hook_point", "target", "why"),
    [(LAST, "blocks.2.hook_mlp_out", "writes"), ("blocks.9.hook_resid_post", None, "3 blocks")],
)
def test_an_sae_that_does_not_fit_is_refused(
    tiny: FrozenModel, ctx: Context, hook_point: str, target: str | None, why: str
) -> None:
    with pytest.raises(InputError) as caught:
        causal_evidence(ctx, tiny, _sae(tiny, hook_point, target), [0], _pairs(), windows=_text())
    assert why in caught.value.why


def test_placebo_latents_are_those_that_fire_as_often() -> None:
    density = torch.tensor([0.1, 0.11, 0.5, 0.0, 0.09, 0.001, 0.45])
    assert equal_firing(density, [0], 2) == [1, 4]
    assert equal_firing(density, [0, 2], 2) == [1, 6]
    assert set(equal_firing(density, [0], 99)) == {1, 2, 4, 5, 6}


def test_null_effects_are_significant_as_often_as_they_say() -> None:
    """Over null trials the sign flips over pairs reject at their level."""
    rng, way, hits, rounds = np.random.default_rng(0), torch.zeros(2), 0, 200

    def trial(kind: str, latent: int, strength: float) -> Trial:
        return Trial(kind, latent, strength, 0, way, 1.0, torch.zeros(1), None)

    latents: Sequence[int] = [7]
    trials = [trial("steer", 7, s) for s in STRENGTHS]
    trials += [trial(kind, 7, 0.0) for kind in ("ablate", "clamp", "complement")]
    trials += [trial("random", -1, REFERENCE) for _ in range(20)]
    for _ in range(rounds):
        effects = rng.normal(size=(len(trials), 8))
        nothing = np.full(len(trials), np.nan)
        found = weigh(trials, Outcomes(effects, nothing, nothing, [str(i) for i in range(8)], np.ones(8)), latents, 0)[
            7
        ]
        hits += found["p_value"] <= 0.05
        assert np.isnan(found["placebo_latents"]) and np.isnan(found["damage_kl"])
    assert hits / rounds <= 0.09
