"""Ground truth: in hand-built grouped-query models every cell of every map is what plain forwards give."""

from __future__ import annotations

import pytest
import torch
from induction_circuit import VARIANTS, Plan, induction_llama, induction_pair, lean
from induction_circuit_oracle import HEADS, STREAM, Oracle, plain_map

from greatctl.patching.metrics import LogitDiff
from greatctl.patching.runs import prepare
from greatctl.patching.sweep import sweep_layer

SITES = (*STREAM, *HEADS)
METRICS = {"logit-diff": LogitDiff()}
LAST = 12  # position of the repeated token, where the answer is read
WITHIN = 0.01  # of the distance between the clean and the corrupted run


class Ground:
    """One variant of the circuit, as greatctl and as the oracle see it, with some pairs."""

    def __init__(self, name: str, corruption: str, n_pairs: int = 1) -> None:
        plan = VARIANTS[name]
        hf = induction_llama(plan)
        self.plan, self.oracle, self.model = plan, Oracle(hf), lean(hf)
        made = [induction_pair(seed, corruption, plan.vocabulary) for seed in range(n_pairs)]
        self.pairs, self.places = [pair for pair, _ in made], [k for _, k in made]

    def ours(self, site: str, direction: str) -> torch.Tensor:
        """Logit differences [b, layers, units, p] of the batched and resumed sweep."""
        group = prepare(self.model, self.pairs, site)
        tables = [
            sweep_layer(self.model, group, layer, direction, METRICS)["logit-diff"]
            for layer in range(self.plan.n_layers)
        ]
        found = torch.stack(tables, 1)
        return found[:, :, None] if site in STREAM else found

    def plain(self, site: str, direction: str) -> torch.Tensor:
        """The same from one Hugging Face forward a cell."""
        rows = []
        for pair in self.pairs:
            both = (pair.corrupted_ids, pair.clean_ids)
            base, source = both if direction == "denoising" else both[::-1]
            logits = torch.stack(
                [plain_map(self.oracle, base, source, site, layer) for layer in range(self.plan.n_layers)]
            )
            rows.append((logits[..., pair.answer_id] - logits[..., pair.wrong_answer_id]).double())
        return torch.stack(rows)

    def normalised(self, values: torch.Tensor) -> torch.Tensor:
        """0 at the corrupted and 1 at the clean run."""
        ends = []
        for ids in ("clean_ids", "corrupted_ids"):
            rows = [(self.oracle.logits(getattr(p, ids)), p) for p in self.pairs]
            ends.append(torch.tensor([float(x[p.answer_id] - x[p.wrong_answer_id]) for x, p in rows]).double())
        clean, corrupted = (end.reshape(-1, *[1] * (values.ndim - 1)) for end in ends)
        return (values - corrupted) / (clean - corrupted)


def compare(ground: Ground, sites: tuple[str, ...], direction: str) -> None:
    for site in sites:
        ours, plain = ground.ours(site, direction), ground.plain(site, direction)
        assert ours.shape == plain.shape, site
        off = (ground.normalised(ours) - ground.normalised(plain)).abs().max()
        assert off < WITHIN, f"{site} {direction}: a cell is {float(off):.3f} off"


@pytest.mark.parametrize("corruption", ["A", "B"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_cell_of_every_map_is_that_of_a_plain_forward(corruption, direction):
    compare(Ground("as in the facts", corruption), SITES, direction)


def test_grouped_heads_with_decoys_are_those_of_plain_forwards():
    compare(Ground("decoys, four on two", "A"), ("resid_mid", "z", "q", "k", "v", "pattern"), "denoising")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("corruption", ["A", "B"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_variant_of_the_circuit_has_the_maps_of_plain_forwards(name, corruption, direction):
    compare(Ground(name, corruption, n_pairs=2), SITES, direction)


def expected(plan: Plan, site: str, corruption: str, k: int) -> dict[tuple[int, int, int], float]:
    """(layer, unit, position) -> the share of the gap that denoising closes there; everywhere else it is 0.

    Corruption A breaks the match: up to the back head it lies in the token at k, then in what was copied to
    k + 1. The token at k itself is still worth 8 %, since the wrong-answer token stands in it and a match that
    finds nothing reads all positions alike. Corruption B leaves the match and changes what is read at k + 1.
    """
    (early, back), (late, match) = plan.back, plan.match
    found: dict[tuple[int, int, int], float] = {}
    if site in ("resid_pre", "resid_mid", "resid_post"):
        for layer in range(plan.n_layers):
            if layer > late or (layer == late and site != "resid_pre"):
                found[layer, 0, LAST] = 1.0
            elif corruption == "B":
                found[layer, 0, k + 1] = 1.0
            elif layer < early or (layer == early and site == "resid_pre"):
                found[layer, 0, k] = 1.0
            else:
                found[layer, 0, k], found[layer, 0, k + 1] = 0.08, 1.0
    if site in ("attn_out", "z"):
        found[late, match if site == "z" else 0, LAST] = 1.0
    only = {
        "A": {
            "attn_out": [(early, 0, k + 1, 1.0)],
            "z": [(early, back, k + 1, 1.0)],
            "v": [(early, plan.kv(back), k, 1.0), (late, plan.kv(match), k, 0.08)],
            "k": [(late, plan.kv(match), k + 1, 1.0)],
            "pattern": [(late, match, LAST, 1.0)],
        },
        "B": {"v": [(late, plan.kv(match), k + 1, 1.0)]},
    }
    for *cell, value in only[corruption].get(site, []):
        found[tuple(cell)] = value
    return found


@pytest.mark.parametrize(
    "name",
    [
        "smaller vocabulary and heads",
        pytest.param("as in the facts", marks=pytest.mark.slow),
        pytest.param("third layer, five on one", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("corruption", ["A", "B"])
def test_the_circuit_is_found_where_it_was_written(name, corruption):
    ground = Ground(name, corruption, n_pairs=3)
    for site in SITES:
        found = ground.normalised(ground.ours(site, "denoising"))
        wanted = torch.zeros_like(found)
        for row, k in enumerate(ground.places):
            for cell, value in expected(ground.plan, site, corruption, k).items():
                wanted[(row, *cell)] = value
        assert (found - wanted).abs().max() < WITHIN, f"{site}: {found.mul(100).round().int().tolist()}"
