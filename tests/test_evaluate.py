"""Evaluation: every number against its naive formula, by group, against a target, spliced in, and written down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sae_folders import ORIGIN, coder_of
from torch import Tensor

from greatctl.sae.directions import matching, neighbours
from greatctl.sae.evaluate import cross_entropy, evaluate, write_evaluation
from greatctl.sae.folder import load, save
from greatctl.sae.loss import Losses
from greatctl.store.tables import read_rows


def rows_of(n: int, d: int = 8, seed: int = 3) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 2


class Half:
    """Halves what it reads: a latent for each dimension and sign, with a decoder that has two equal rows."""

    def __init__(self, d: int = 8) -> None:
        self.d_sae = 2 * d
        eye = torch.eye(d)
        self.W_dec = torch.cat([eye, -eye])
        self.W_dec[1] = self.W_dec[0]

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], dim=1).relu()

    def decode(self, latents: Tensor) -> Tensor:
        d = self.d_sae // 2
        return (latents[:, :d] - latents[:, d:]) / 2


def naive_ev(y: Tensor, rebuilt: Tensor) -> float:
    around = (y.double() - y.double().mean(dim=0)).square().sum()
    return float(1 - (y.double() - rebuilt.double()).square().sum() / around)


def test_measurements_equal_the_naive_formulas(tmp_path: Path) -> None:
    save(tmp_path / "sae", coder_of("topk"), 1.0, ORIGIN)
    sae = load(tmp_path / "sae")
    x = torch.randn(333, 12, generator=torch.Generator().manual_seed(9)) + 5
    found = evaluate(sae, x, chunk=50)
    latents = sae.encode(x)
    rebuilt, rows = sae.decode(latents).double(), x.double()
    residual = sum(float((a - b) @ (a - b)) for a, b in zip(rows, rebuilt, strict=True))
    around = sum(float((a - rows.mean(dim=0)) @ (a - rows.mean(dim=0))) for a in rows)
    assert found["explained_variance"] == pytest.approx(1 - residual / around, rel=1e-6)
    assert found["nmse"] == pytest.approx(residual / sum(float(a @ a) for a in rows), rel=1e-6)
    counts = [(row > 0).sum().item() for row in latents]
    assert found["l0"] == pytest.approx(sum(counts) / 333)
    assert found["l0_percentiles"]["50"] == sorted(counts)[166]  # type: ignore[index]
    silent = [not bool((latents[:, i] > 0).any()) for i in range(40)]
    assert found["silent_fraction"] == pytest.approx(sum(silent) / 40)
    assert sum(found["density_histogram"]["latents"]) == 40 - sum(silent)  # type: ignore[index]
    assert found["explained_variance"] < 1 - found["nmse"]  # the flattering number is the other one  # type: ignore


def test_nothing_held_out_or_no_variance_gives_none_and_no_nan() -> None:
    sae = coder_of("topk")
    sae.d_sae = 40  # type: ignore[assignment]
    assert evaluate(sae, torch.zeros(0, 12))["explained_variance"] is None  # type: ignore[arg-type]
    constant = evaluate(sae, torch.ones(20, 12))  # type: ignore[arg-type]
    assert constant["explained_variance"] is None and constant["l0"] <= 4
    json.dumps(constant, allow_nan=False)


def test_cross_entropy_recovered_is_one_for_a_perfect_sae_and_zero_for_an_empty_one() -> None:
    x = torch.randn(50, 12)

    class Identity:
        d_sae = 12
        factor = 1.0

        def encode(self, rows: Tensor) -> Tensor:
            return rows * self.factor

        def decode(self, latents: Tensor) -> Tensor:
            return latents

    def ce(edit) -> float:
        return 2.0 + float((x - (x if edit is None else edit(x))).square().mean())

    perfect = Identity()
    assert cross_entropy(ce, perfect)["ce_loss_recovered"] == pytest.approx(1)
    perfect.factor = 0.0
    found = cross_entropy(ce, perfect)
    assert found["ce_loss_recovered"] == pytest.approx(0) and found["ce_clean"] == 2.0
    assert cross_entropy(lambda edit: 3.0, perfect)["ce_loss_recovered"] is None


def test_each_group_is_measured_about_its_own_mean() -> None:
    x, sae = rows_of(90), Half()
    x[:30] += 20  # another author, far away: about the common mean it would look well explained
    labels = ["far"] * 30 + ["near"] * 60
    found = evaluate(sae, x, groups={"author": labels}, chunk=7)
    for row, chosen in zip(found["per_author"], (x[:30], x[30:]), strict=True):  # type: ignore[call-overload]
        rebuilt = sae.decode(sae.encode(chosen))
        assert row["explained_variance"] == pytest.approx(naive_ev(chosen, rebuilt), rel=1e-6)
        counts = (sae.encode(chosen) > 0).sum(dim=1).double()
        assert row["l0"] == pytest.approx(float(counts.mean()))
        assert row["l0_p50"] == pytest.approx(float(counts.quantile(0.5)))
    assert [row["label"] for row in found["per_author"]] == ["far", "near"]  # type: ignore[union-attr]
    assert [row["rows"] for row in found["per_author"]] == [30, 60]  # type: ignore[union-attr]
    assert found["explained_variance"] == pytest.approx(naive_ev(x, sae.decode(sae.encode(x))), rel=1e-6)


def test_one_row_of_a_label_has_no_variance_and_says_so() -> None:
    found = evaluate(Half(), rows_of(5), groups={"work": ["a", "b", "b", "b", "b"]})
    lonely, other = found["per_work"]  # type: ignore[misc]
    assert lonely["explained_variance"] is None and "vary" in lonely["undefined"]
    assert other["undefined"] is None and lonely["l0"] == 8
    none = evaluate(Half(), torch.zeros(0, 8), groups={"work": []})
    assert none["undefined"]["explained_variance"] == "no row is held out"  # type: ignore[index]
    json.dumps([found, none], allow_nan=False)


def test_a_transcoder_is_measured_against_its_target() -> None:
    x, y = rows_of(40), rows_of(40, 5, seed=4)

    class Skip(Half):
        d_out = 5

        def reconstruct(self, rows: Tensor) -> Tensor:
            return rows[:, :5] * 0.1 + 2

    found = evaluate(Skip(), x, target=y, chunk=9)
    assert found["explained_variance"] == pytest.approx(naive_ev(y, x[:, :5] * 0.1 + 2), rel=1e-6)


def test_the_chunk_does_not_change_the_numbers() -> None:
    x = rows_of(101)
    one, many = (evaluate(Half(), x, groups={"w": ["a"] * 50 + ["b"] * 51}, chunk=c) for c in (1000, 13))
    assert one["explained_variance"] == pytest.approx(many["explained_variance"], rel=1e-9)
    assert one["l0_percentiles"] == many["l0_percentiles"] and one["density_histogram"] == many["density_histogram"]


def test_neighbours_find_the_row_that_is_there_twice_and_leave_out_rows_without_direction() -> None:
    W = Half().W_dec.clone()
    W[5] = 0
    found = neighbours(W * 3)
    assert found["closest"][0] == {"latent": 0, "neighbour": 1, "cosine": pytest.approx(1)}  # type: ignore[index]
    assert found["compared"] == 15 and found["above_0.9"] == pytest.approx(2 / 15)
    assert all(5 not in (pair["latent"], pair["neighbour"]) for pair in found["closest"])  # type: ignore[union-attr]
    assert neighbours(torch.zeros(4, 3)) == {}


def test_matching_finds_a_permutation_and_knows_what_has_no_partner() -> None:
    g = torch.Generator().manual_seed(8)
    ours = torch.linalg.qr(torch.randn(12, 12, generator=g)).Q
    theirs = 5 * ours[torch.randperm(12, generator=g)]
    assert matching(ours, theirs)["hungarian_mean_cosine"] == pytest.approx(1, abs=1e-5)
    found = matching(ours, theirs[:6])  # one-to-one: half of ours stay alone
    assert found["ours_matched_0.7"] == 0.5 and found["theirs_matched_0.7"] == 1
    assert found["theirs_mean_max_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["ours_mean_max_cosine"] == pytest.approx(0.5, abs=1e-5)


class Bigram:
    """A loss that can be measured: logits are a linear map of the edited rows of each window."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.x, self.readout = rows_of(24), torch.randn(8, 5, generator=g)
        self.next = torch.randint(5, (24,), generator=g)
        self.labels = ["a", "a", "b", "b"]

    def __call__(self, edit) -> float:
        raise AssertionError("measure gives everything in one pass")

    def measure(self, edits) -> Losses:
        def nats(x: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy((x @ self.readout).double(), self.next, reduction="none")

        def kl(x: Tensor) -> Tensor:
            p, q = ((v @ self.readout).double().log_softmax(dim=-1) for v in (self.x, x))
            return (p.exp() * (p - q)).sum(dim=-1)

        ce = {"clean": nats(self.x), **{n: nats(e(self.x)) for n, e in edits.items()}}
        divergences = {n: kl(e(self.x)) for n, e in edits.items()}
        by_window = lambda v: v.view(4, 6).sum(dim=1)  # noqa: E731
        return Losses(
            torch.full((4,), 6),
            {n: by_window(v) for n, v in ce.items()},
            {n: by_window(v) for n, v in divergences.items()},
            {"author": self.labels},
        )


def test_zero_and_mean_ablation_are_two_numbers_and_kl_stands_beside_them() -> None:
    loss = Bigram()
    mean = loss.x.mean(dim=0)
    found = cross_entropy(loss, Half(), mean=mean)
    logits = {n: v @ loss.readout for n, v in {"clean": loss.x, "spliced": loss.x / 2, "zero": loss.x * 0}.items()}
    logits["mean"] = mean.expand(24, -1) @ loss.readout
    ce = {n: float(torch.nn.functional.cross_entropy(v.double(), loss.next)) for n, v in logits.items()}
    for name, value in ce.items():
        assert found[f"ce_{name}"] == pytest.approx(value, rel=1e-5)
    for floor, key in (("zero", "ce_loss_recovered"), ("mean", "ce_loss_recovered_mean")):
        gap = ce[floor] - ce["clean"]
        if gap > 0:
            assert found[key] == pytest.approx((ce[floor] - ce["spliced"]) / gap, rel=1e-4)
        else:
            assert found[key] is None and "nothing" in found["ce_undefined"][key]  # type: ignore[index]
    assert found["kl"] > 0 and found["kl_zero"] != found["kl_mean"]  # type: ignore[operator]
    tables = found["ce_per_author"]
    assert [row["predicted"] for row in tables] == [12, 12]  # type: ignore[union-attr]
    whole = sum(row["ce_spliced"] * 12 for row in tables) / 24  # type: ignore[union-attr]
    assert whole == pytest.approx(ce["spliced"], rel=1e-5)


def test_what_was_not_measured_is_none_with_a_reason() -> None:
    nothing = cross_entropy(None, Half())
    assert nothing["ce_loss_recovered"] is None and nothing["ce_undefined"]["kl"] == "no window was read"  # type: ignore[index]
    plain = cross_entropy(lambda edit: 1.0 if edit is None else 2.0, Half())
    assert plain["ce_loss_recovered"] == 0 and plain["kl"] is None and plain["ce_mean"] is None
    assert plain["ce_undefined"]["ce_mean"] == "no mean was given"  # type: ignore[index]
    assert "distribution" in plain["ce_undefined"]["kl"]  # type: ignore[index]


def test_the_folder_holds_a_json_and_a_table_for_each_grouping(tmp_path: Path) -> None:
    loss = Bigram()
    measured = evaluate(Half(), loss.x, groups={"author": ["a"] * 10 + ["c"] * 14})
    measured |= cross_entropy(loss, Half(), mean=loss.x.mean(dim=0))
    write_evaluation(tmp_path, measured)
    assert {p.name for p in tmp_path.iterdir()} == {"evaluation.json", "evaluation_author.parquet"}
    assert json.loads((tmp_path / "evaluation.json").read_text())["ce_mean"] == measured["ce_mean"]
    a, c = read_rows(tmp_path / "evaluation_author.parquet")
    assert a["rows"] == 10 and a["predicted"] == 12 and a["ce_spliced"] is not None
    assert c["label"] == "c" and c["predicted"] is None  # no window of that author was read


class Lens:
    """A frozen model of two sites: late = early @ M, logits = late @ U."""

    device = torch.device("cpu")
    revision = "r1"

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(6)
        self.embed, self.M, self.U = (torch.randn(s, generator=g) for s in ((30, 6), (6, 4), (4, 30)))
        self.landed: list[Tensor] = []

    def run(self, tokens: Tensor, interventions=()) -> Tensor:
        edits = {one.site: one.edit for one in interventions}
        early = edits.get("early", lambda v: v)(self.embed[tokens])
        late = edits.get("late", lambda v: v)(early @ self.M)
        self.landed.append(late)
        return late @ self.U


def test_a_transcoder_reads_one_site_and_lands_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from greatctl.events import Run
    from greatctl.stages import splice

    lens = Lens()
    monkeypatch.setattr(splice, "open_recorded", lambda *a, **k: lens)
    ids = torch.randint(2, 30, (3, 9), generator=torch.Generator().manual_seed(2)).int()
    ids[:, 0] = 0
    store = SimpleNamespace(
        input_ids=ids,
        length=torch.tensor([9, 9, 6]),
        documents=[{"split": "heldout-work", "unit": "u", "work": "w"}],
        windows={"document": [0, 0, 0]},
    )
    meta = {"model": "lens", "model_revision": "r1", "hook_point": "early", "special_ids": [0, 1]}
    ctx = SimpleNamespace(run=Run("train"))
    ce = splice.spliced_loss(ctx, meta, store, torch.ones(3, dtype=torch.bool), 9, target_hook_point="late")  # type: ignore[arg-type]
    assert ce is not None
    exact = SimpleNamespace(d_out=4, reconstruct=lambda x: x @ lens.M)
    found = cross_entropy(ce, exact, mean=torch.full((4,), 0.5))
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"]) and found["kl"] == pytest.approx(0, abs=1e-5)
    assert found["ce_zero"] != pytest.approx(found["ce_clean"])
    assert found["ce_per_split"][0]["predicted"] == 8 + 8 + 5  # type: ignore[index]
    mean_run = lens.landed[-1]
    assert bool((mean_run[:, 1:6] == 0.5).all()) and not bool((mean_run[:, 0] == 0.5).any())
