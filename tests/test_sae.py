"""The autoencoders: recovery of a planted dictionary, gradients, data, folding, folders and measurements."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from planted import dictionary, planted, recovery, rows_of, write_shards
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from greatctl.errors import InputError, IntegrityError, StageError
from greatctl.events import Run
from greatctl.sae.auxk import auxk
from greatctl.sae.batchtopk import BatchTopK, kth_largest
from greatctl.sae.coder import Coder, CoderConfig
from greatctl.sae.data import ActivationRows, Cursor
from greatctl.sae.evaluate import cross_entropy, evaluate
from greatctl.sae.folder import Origin, export, load, save
from greatctl.sae.produce import default_batch_size
from greatctl.sae.relu import Relu
from greatctl.sae.topk import TopK
from greatctl.sae.trainer import Checkpoints, Settings, Trainer, build, default_dead_window, default_lr
from greatctl.store.shards import ShardReader

ROOT = Path(__file__).resolve().parents[1]
ORIGIN = Origin("toy", "blocks.1.hook_resid_post", 17)
ARCHITECTURES = [
    (Relu, {"l1_coefficient": 0.1}),
    (Relu, {"l1_coefficient": 0.1, "decoder_norm_weighted": False}),
    (TopK, {"k": 4}),
    (BatchTopK, {"k": 4}),
]
NAMES = ["relu", "relu-unit", "topk", "batchtopk"]


def coder_of(cls: type[Coder], *, d_in: int = 12, d_sae: int = 40, seed: int = 3, **options) -> Coder:
    """A coder away from its initialisation, so that nothing is accidentally zero or tied."""
    coder = build(cls, cls.Config(d_in=d_in, d_sae=d_sae, **options), seed)
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    coder.after_step()
    return coder


def settings(**changes) -> Settings:
    """Short and quick unless told."""
    values = {
        "steps": 60,
        "batch_size": 256,
        "lr": 1e-3,
        "warmup_steps": 5,
        "dead_window": 2000,
        "checkpoint_every": 10_000,
        "log_every": 10,
        "seed": 0,
    }
    return Settings(**{**values, **changes})


def trained(tmp_path: Path, cls: type[Coder], acts: Tensor, *, d_sae: int, options: dict, **changes) -> Trainer:
    """A trainer that has run to its end."""
    rows = rows_of(tmp_path / "shards", acts)
    coder = build(cls, cls.Config(d_in=acts.shape[1], d_sae=d_sae, **options), changes.get("seed", 0))
    trainer = Trainer(coder, rows, settings(**changes), Checkpoints(tmp_path / "checkpoints"), Run("train"))
    trainer.fit()
    return trainer


class Registered:
    """A registry with one architecture."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def get(self, kind: str, name: str) -> type:
        """The one class."""
        assert (kind, name) == ("architectures", self.cls.name)
        return self.cls


class Soft(Coder):
    """A plugin's architecture: softplus latents above a margin, one buffer of its own, random masking."""

    name = "soft"
    Config = CoderConfig

    def __init__(self, config: CoderConfig) -> None:
        super().__init__(config)
        self.register_buffer("margin", torch.tensor(0.25))

    def encode(self, x: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(self.pre_acts(x)) - self.margin).relu()

    def losses(self, x: Tensor, *, dead: Tensor, step: int) -> dict[str, Tensor]:
        latents = self.encode(x)
        mask = torch.rand_like(x) < 0.9
        return {"mse": ((x - self.decode(latents)) * mask).square().mean(), "sparse": 1e-3 * latents.mean()}


# ---------------------------------------------------------------- recovery


def test_topk_recovers_a_planted_dictionary_and_a_frozen_decoder_does_not(tmp_path: Path) -> None:
    truth = dictionary(64, 32)
    trainer = trained(
        tmp_path, TopK, planted(60_000, truth), d_sae=64, options={"k": 3}, steps=700, batch_size=256, lr=2e-3
    )
    frozen = build(TopK, TopK.Config(d_in=32, d_sae=64, k=3), 0)
    assert recovery(truth, trainer.coder.W_dec.detach()) > 0.93
    assert recovery(truth, frozen.W_dec.detach()) < 0.53
    assert recovery(truth, dictionary(200, 32)[100:164]) == pytest.approx(
        recovery(truth, frozen.W_dec.detach()), abs=0.05
    )
    assert torch.allclose(trainer.coder.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


@pytest.mark.parametrize(("cls", "options"), ARCHITECTURES, ids=NAMES)
def test_every_architecture_learns(tmp_path: Path, cls: type[Coder], options: dict) -> None:
    truth = dictionary(64, 32)
    trainer = trained(tmp_path, cls, planted(20_000, truth), d_sae=64, options=options, steps=150, lr=2e-3)
    first, last = trainer.log[0], trainer.log[-1]
    assert last["explained_variance"] > 0.5 > first["explained_variance"]
    assert [row["step"] for row in trainer.log] == [*range(0, 150, 10), 149]


# ---------------------------------------------------------------- gradients


def naive_losses(coder: Coder, x: Tensor, dead: Tensor, step: int) -> dict[str, Tensor]:
    """The docstrings' formulas, row by row, with nothing in common with the code under test."""
    W_enc, b_enc, W_dec, b_dec = coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec
    pre = torch.stack([(row - b_dec) @ W_enc + b_enc for row in x])
    n, d = x.shape
    if isinstance(coder, Relu):
        latents = pre.clamp_min(0)
        norms = W_dec.square().sum(dim=1).sqrt() if coder.config.decoder_norm_weighted else torch.ones(pre.shape[1])
        rebuilt = torch.stack([row @ W_dec + b_dec for row in latents])
        l1 = coder.config.l1_coefficient * (latents * norms).sum() / n / math.sqrt(d)
        return {"mse": ((x - rebuilt) ** 2).sum() / n / d, "l1": l1}
    k = coder.config.k
    keep = torch.zeros_like(pre)
    if isinstance(coder, BatchTopK):
        keep.view(-1)[pre.detach().flatten().sort(descending=True).indices[: n * k]] = 1
    else:
        for i, row in enumerate(pre.detach()):
            keep[i, row.sort(descending=True).indices[:k]] = 1
    latents = (pre * keep).clamp_min(0)
    residual = x - (latents @ W_dec + b_dec)
    error = residual.detach()
    index = [i for i in range(pre.shape[1]) if dead[i]]
    k_aux = min(d // 2, len(index))
    rebuilt = []
    for row in pre:
        best = sorted(index, key=lambda i: -row[i].item())[:k_aux]
        rebuilt.append(sum((row[i].clamp_min(0) * W_dec[i] for i in best), torch.zeros(d, dtype=x.dtype)))
    share = ((error - torch.stack(rebuilt)) ** 2).sum() / ((error - error.mean(dim=0)) ** 2).sum()
    return {"mse": (residual**2).sum() / n / d, "auxk": coder.config.aux_coefficient * share}


@pytest.mark.parametrize(("cls", "options"), ARCHITECTURES, ids=NAMES)
def test_each_loss_term_has_the_gradient_of_its_formula(cls: type[Coder], options: dict) -> None:
    coder = coder_of(cls, **options).double()
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    dead = torch.arange(40) % 3 == 0
    expected = naive_losses(coder, x, dead, 7)
    found = coder.losses(x, dead=dead, step=7)
    assert set(found) == set(expected)
    for name, term in found.items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-10)
        ours = torch.autograd.grad(term, list(coder.parameters()), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(expected[name], list(coder.parameters()), retain_graph=True, allow_unused=True)
        for a, b, (parameter, _) in zip(ours, theirs, coder.named_parameters(), strict=True):
            zero = torch.zeros(())
            assert torch.allclose(zero if a is None else a, zero if b is None else b, atol=1e-10), (
                name,
                parameter,
            )


def test_auxk_moves_the_encoders_of_dead_latents() -> None:
    coder = coder_of(TopK, k=2, aux_coefficient=1.0)
    with torch.no_grad():
        coder.b_enc[:8] = -100.0  # never among the k winners
    dead = torch.arange(40) < 8
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        coder.b_enc[:8] = 0.5
    terms = coder.losses(x, dead=dead, step=0)
    (grad,) = torch.autograd.grad(terms["auxk"], coder.W_enc)
    assert float(grad[:, :8].norm()) > 1e-3
    assert float(grad[:, 8:].norm()) == 0


def test_auxk_is_zero_without_dead_latents_and_counted_where_it_is_not_finite() -> None:
    coder = coder_of(TopK, k=2)
    x = torch.randn(8, 12)
    assert coder.losses(x, dead=torch.zeros(40, dtype=torch.bool), step=0)["auxk"].item() == 0.0
    one = coder.losses(x[:1], dead=torch.ones(40, dtype=torch.bool), step=0)  # one row has no variance to explain
    assert one["auxk"].item() == 0.0 and coder.counts["auxk_not_finite"] == 1
    assert auxk(torch.zeros(1, 40), torch.zeros(1, 12), coder.W_dec, torch.ones(40, dtype=torch.bool)) is None


def test_the_gradient_along_unit_rows_is_removed_and_free_rows_keep_theirs() -> None:
    for cls, options, unit in ((TopK, {"k": 4}, True), (Relu, {}, False)):
        coder = coder_of(cls, **options)
        sum(coder.losses(torch.randn(16, 12), dead=torch.zeros(40, dtype=torch.bool), step=0).values()).backward()
        coder.project_gradients()
        along = (coder.W_dec.grad * coder.W_dec.detach()).sum(dim=1).abs().max()
        assert (float(along) < 1e-6) is unit


def test_the_kth_largest_is_exact() -> None:
    g = torch.Generator().manual_seed(1)
    for shape, count in (((500, 512), 500 * 8), ((7, 9), 20), ((300, 256), 1)):
        values = torch.randn(shape, generator=g)
        assert kth_largest(values, count) == values.flatten().sort(descending=True).values[count - 1]
    few = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    assert kth_largest(few, 3) == 2.0
    assert kth_largest(-few.abs(), 3) > 0


# ---------------------------------------------------------------- data


def test_special_rows_and_outliers_are_counted_and_never_served(tmp_path: Path) -> None:
    acts = torch.randn(1000, 8, generator=torch.Generator().manual_seed(2))
    token = torch.ones(1000)
    token[::50] = 0
    acts[::50] = 500.0
    acts[7] *= 100
    write_shards(tmp_path, acts, torch.arange(1000) // 100, token, size=300)
    held = torch.arange(10) >= 9
    rows = ActivationRows(ShardReader(tmp_path), [0], held)
    assert (rows.counts.special, rows.counts.outliers, rows.counts.held_out) == (20, 1, 98)
    assert rows.counts.train == 1000 - 20 - 1 - 98
    stream = rows.stream(0, 64, Cursor())
    seen = torch.cat([next(stream)[1] for _ in range(rows.steps(0, 64, 1))])
    assert seen.shape[0] == rows.counts.train
    assert float(seen.norm(dim=1).max()) < 50
    usable = (token[:900] != 0) & (torch.arange(900) != 7)
    assert torch.equal(seen.sum(dim=1).sort().values, acts[:900][usable].sum(dim=1).sort().values)
    assert torch.allclose(rows.mean, acts[:900][usable].double().mean(dim=0), atol=1e-12)
    assert torch.equal(rows.held_out(), acts[900:][token[900:] != 0])
    assert rows.held_out(limit=10).shape[0] == 10


@pytest.mark.parametrize("budget", [2**30, 300 * 8 * 4 * 2], ids=["one block", "blocks"])
def test_each_row_comes_once_an_epoch_in_a_new_order_and_any_cursor_resumes(tmp_path: Path, budget: int) -> None:
    acts = torch.arange(2000 * 8, dtype=torch.float32).view(2000, 8) + 1e6
    rows = rows_of(tmp_path, acts, held_out=0.2, shard=300, budget=budget)
    total = rows.steps(5, 128, 2)
    stream = rows.stream(5, 128, Cursor())
    served = [next(stream) for _ in range(total)]
    firsts = [batch[:, 0] for _, batch in served]
    per_epoch = [torch.cat([f for (c, _), f in zip(served, firsts, strict=True) if c.epoch == e]) for e in (0, 1)]
    for epoch in per_epoch:
        assert torch.equal(epoch.sort().values, acts[:1600, 0])
    assert not torch.equal(per_epoch[0], per_epoch[1])
    assert max(f.numel() for f in firsts) < 192
    for at in (0, 3, total // 2, total - 2):
        again = rows.stream(5, 128, served[at][0])
        assert torch.equal(next(again)[1], served[at + 1][1])


def test_a_row_that_is_not_finite_is_refused_with_its_coordinates(tmp_path: Path) -> None:
    acts = torch.randn(100, 8)
    acts[41, 3] = float("nan")
    with pytest.raises(StageError) as caught:
        rows_of(tmp_path, acts, shard=30)
    assert "shard-00001" in str(caught.value) and "row 11" in str(caught.value)
    assert "window 2" in caught.value.why


def test_nothing_to_train_on_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="held out"):
        rows_of(tmp_path / "a", torch.randn(50, 8), held_out=1.0)
    write_shards(tmp_path / "b", torch.randn(5, 8), torch.zeros(5), torch.zeros(5), size=5)
    with pytest.raises(StageError, match="no activations"):
        ActivationRows(ShardReader(tmp_path / "b"), [0], torch.zeros(1, dtype=torch.bool))


# ---------------------------------------------------------------- trainer


def test_fewer_rows_than_a_batch_and_constant_rows_train_without_nan(tmp_path: Path) -> None:
    few = trained(tmp_path / "few", TopK, torch.randn(40, 8), d_sae=16, options={"k": 2}, steps=5, batch_size=4096)
    assert few.tokens == 5 * few.rows.counts.train and math.isfinite(few.log[-1]["loss"])
    flat = trained(tmp_path / "flat", BatchTopK, torch.ones(100, 8), d_sae=16, options={"k": 2}, steps=5)
    assert all(math.isfinite(v) for row in flat.log for v in row.values())


@pytest.mark.parametrize(("cls", "options"), [*ARCHITECTURES, (Soft, {})], ids=[*NAMES, "plugin"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, cls: type[Coder], options: dict) -> None:
    acts = planted(3000, dictionary(32, 16))
    whole = trained(tmp_path / "whole", cls, acts, d_sae=32, options=options, steps=41, dead_window=300)
    rows = rows_of(tmp_path / "halves", acts)
    checkpoints = Checkpoints(tmp_path / "saved")
    rules = settings(steps=41, dead_window=300, checkpoint_every=7)
    coder = build(cls, cls.Config(d_in=16, d_sae=32, **options), 0)
    first = Trainer(coder, rows, rules, checkpoints, Run("train"))
    first.run.stop.request(15)
    for _ in range(2):  # stops after one step each time
        with pytest.raises(Exception, match="stopped on request"):
            Trainer(build(cls, cls.Config(d_in=16, d_sae=32, **options), 0), rows, rules, checkpoints, first.run).fit()
    last = Trainer(build(cls, cls.Config(d_in=16, d_sae=32, **options), 0), rows, rules, checkpoints, Run("train"))
    assert last.resumed_at == 2
    torch.rand(5)  # someone else's use of the global generator must not matter
    last.fit()
    for (name, a), b in zip(whole.coder.state_dict().items(), last.coder.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.log == last.log and torch.equal(whole.since_fired, last.since_fired)


def test_divergence_stops_at_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Poisoned(TopK):
        def losses(self, x: Tensor, *, dead: Tensor, step: int) -> dict[str, Tensor]:
            terms = dict(super().losses(x, dead=dead, step=step))
            return {**terms, "mse": terms["mse"] * (float("inf") if step == 12 else 1.0)}

    with pytest.raises(StageError, match="diverged at step 12"):
        trained(
            tmp_path,
            Poisoned,
            planted(2000, dictionary(32, 16)),
            d_sae=32,
            options={"k": 2},
            checkpoint_every=5,
        )
    tensors, state = Checkpoints(tmp_path / "checkpoints").latest()  # type: ignore[misc]
    assert state["step"] == 10
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())


def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10, 15):
        checkpoints.write(step, {"a": torch.tensor(float(step))}, {"step": step})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000010.safetensors", "step-000000015.safetensors"]
    (tmp_path / names[1]).write_bytes(b"torn")
    assert checkpoints.latest() == ({"a": torch.tensor(10.0)}, {"step": 10})


def test_the_rate_warms_up_stays_and_falls_to_zero_over_the_last_fifth() -> None:
    rules = settings(steps=100, lr=1.0, warmup_steps=10)
    assert [rules.lr_at(s) for s in (0, 9, 50, 79, 80, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 1, 0.5, 0.05])
    assert default_lr(32768, 50_000) == pytest.approx(2e-4 / math.sqrt(2)) and default_lr(64, 100) == 3e-3
    assert default_lr(32768, 2500) == pytest.approx(2 * default_lr(32768, 10_000))
    assert default_dead_window(10**9, 4096) == 10_000_000 and default_dead_window(1000, 64) == 512
    assert default_batch_size(10**7, 4 * 10**7) == 4096 and default_batch_size(100_000, 400_000) == 256


def test_a_dead_latent_is_one_that_has_not_fired_within_the_window(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, planted(2000, dictionary(32, 16)))
    coder = build(TopK, TopK.Config(d_in=16, d_sae=32, k=2, aux_coefficient=0.0), 0)
    with torch.no_grad():
        coder.b_enc[0] = -1e6
    trainer = Trainer(coder, rows, settings(steps=10, dead_window=2000), Checkpoints(tmp_path / "c"), Run("train"))
    trainer.fit()
    assert trainer.since_fired[0] == trainer.tokens > 2000
    assert bool(trainer.dead[0]) and not bool(trainer.dead.all())


# ---------------------------------------------------------------- folder


@pytest.mark.parametrize(("cls", "options"), [*ARCHITECTURES, (Soft, {})], ids=[*NAMES, "plugin"])
def test_an_sae_trained_on_scaled_inputs_reads_raw_ones_from_its_folder(
    tmp_path: Path, cls: type[Coder], options: dict
) -> None:
    truth = dictionary(32, 16)
    trainer = trained(tmp_path, cls, planted(4000, truth) / 3.7, d_sae=32, options=options, steps=60)
    x = planted(500, truth, seed=77) / 3.7
    trainer.coder.calibrate(x * trainer.scale)
    save(tmp_path / "sae", trainer.coder, trainer.scale, ORIGIN)
    sae = load(tmp_path / "sae", Registered(cls))
    coder = trainer.coder.eval()
    with torch.no_grad():
        latents = coder.encode(x * trainer.scale)
        expected = coder.decode(latents) / trainer.scale
    found = sae.encode(x)
    assert torch.allclose(sae.decode(found), expected, atol=1e-5)
    assert ((found > 0) == (latents > 0)).float().mean() > 0.9999
    assert (sae.name, sae.d_in, sae.d_sae, sae.arch, sae.hook_point) == (
        "sae",
        16,
        32,
        cls.name,
        ORIGIN.hook_point,
    )
    if cls is not Soft:
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)
        contributions = latents[:, :, None] * coder.W_dec / trainer.scale
        assert torch.allclose(found[:, :, None] * sae.W_dec, contributions, atol=1e-5)


def test_cfg_has_the_keys_of_the_layout_and_the_file_its_tensors(tmp_path: Path) -> None:
    shared = {
        "architecture",
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
    }
    shared |= {"reshape_activations", "metadata"}
    four = {"W_enc": (12, 40), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,)}
    expected = {
        "relu": (Relu, {}, "standard", set(), four),
        "topk": (TopK, {"k": 4}, "topk", {"k", "rescale_acts_by_decoder_norm"}, four),
        "batchtopk": (BatchTopK, {"k": 4}, "jumprelu", set(), {**four, "threshold": (40,)}),
    }
    for name, (cls, options, architecture, extra, shapes) in expected.items():
        coder = coder_of(cls, **options)
        save(tmp_path / name, coder, 2.0, ORIGIN)
        cfg = json.loads((tmp_path / name / "cfg.json").read_text())
        assert set(cfg) == shared | extra
        assert (cfg["architecture"], cfg["normalize_activations"], cfg["dtype"]) == (
            architecture,
            "none",
            "float32",
        )
        assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"
        assert cfg["metadata"]["training_architecture"] == name
        assert cfg["metadata"]["hook_name"] == ORIGIN.hook_point and cfg["metadata"]["seqpos_slice"] == [None]
        tensors = load_file(tmp_path / name / "sae_weights.safetensors")
        assert {k: tuple(v.shape) for k, v in tensors.items()} == shapes
        assert all(v.dtype == torch.float32 for v in tensors.values())
    assert cfg.get("k") is None and len(tensors["threshold"].unique()) == 1


def test_a_zero_decoder_row_stays_zero_and_finite_when_folded(tmp_path: Path) -> None:
    coder = coder_of(Relu)
    with torch.no_grad():
        coder.W_dec[3] = 0
    save(tmp_path / "sae", coder, 2.0, ORIGIN)
    sae = load(tmp_path / "sae")
    assert float(sae.W_dec[3].norm()) == 0 and bool(torch.isfinite(sae.encode(torch.randn(5, 12))).all())


def test_unknown_layouts_and_architectures_are_refused_by_name(tmp_path: Path) -> None:
    for file, layout in (("sae.safetensors", "sparsify"), ("ae.pt", "dictionary_learning")):
        folder = tmp_path / layout
        folder.mkdir()
        (folder / file).write_bytes(b"x")
        (folder / "cfg.json").write_text("{}")
        with pytest.raises(InputError) as caught:
            load(folder)
        assert layout in caught.value.why
    save(tmp_path / "soft", coder_of(Soft), 1.0, ORIGIN)
    with pytest.raises(InputError, match="'soft' cannot be read"):
        load(tmp_path / "soft")
    save(tmp_path / "sae", coder_of(TopK, k=4), 1.0, ORIGIN)
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    for change, error in (
        ({"normalize_activations": "expected_average_only_in"}, InputError),
        ({"d_sae": 41}, IntegrityError),
        ({"dtype": None, "d_in": None}, IntegrityError),
    ):
        (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**cfg, **change}))
        with pytest.raises(error):
            load(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        load(tmp_path / "sae")


def test_exports_are_written_beside_the_folder_s_files(tmp_path: Path) -> None:
    save(tmp_path / "sae", coder_of(TopK, k=4), 1.0, ORIGIN)
    copy = export(tmp_path / "sae", "saelens")
    assert sorted(p.name for p in copy.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert torch.equal(load(copy).W_dec, load(tmp_path / "sae").W_dec)
    path = export(tmp_path / "sae", "pth")
    assert path == tmp_path / "sae" / "exports" / "sae.pth"
    assert set(torch.load(path, weights_only=True)["state_dict"]) == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_k_above_d_sae_is_refused() -> None:
    with pytest.raises(ValidationError, match="k = 41 is above d_sae = 40"):
        TopK.Config(d_in=12, d_sae=40, k=41)


# ---------------------------------------------------------------- evaluation


def test_measurements_equal_the_naive_formulas(tmp_path: Path) -> None:
    coder = coder_of(TopK, k=4)
    save(tmp_path / "sae", coder, 1.0, ORIGIN)
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
    sae = coder_of(TopK, k=4)
    sae.d_sae = 40  # type: ignore[assignment]
    assert evaluate(sae, torch.zeros(0, 12))["explained_variance"] is None  # type: ignore[arg-type]
    constant = evaluate(sae, torch.ones(20, 12))  # type: ignore[arg-type]
    assert constant["explained_variance"] is None and constant["l0"] <= 4
    json.dumps(constant, allow_nan=False)


def test_the_threshold_is_calibrated_to_l0_equal_k_on_held_out_rows(tmp_path: Path) -> None:
    trainer = trained(tmp_path, BatchTopK, planted(8000, dictionary(64, 32)), d_sae=128, options={"k": 6}, steps=80)
    held = trainer.rows.held_out()
    trainer.coder.calibrate(held * trainer.scale)
    save(tmp_path / "sae", trainer.coder, trainer.scale, ORIGIN)
    assert evaluate(load(tmp_path / "sae"), held)["l0"] == pytest.approx(6, rel=0.02)


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


# ---------------------------------------------------------------- the other implementation

_SAELENS_CHECK = """
import sys, torch, json
from sae_lens import SAE
from safetensors.torch import load_file, save_file
x = load_file(sys.argv[1])["x"]
found = {}
for folder in sys.argv[3:]:
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        latents = sae.encode(x)
        found[folder + "/latents"], found[folder + "/rebuilt"] = latents, sae.decode(latents)
save_file({k: v.contiguous() for k, v in found.items()}, sys.argv[2])
"""


def saelens_python() -> Path | None:
    """An interpreter that has sae-lens, if one was set up."""
    named = os.environ.get("GREATCTL_SAELENS_PYTHON")
    path = Path(named) if named else ROOT / ".bench" / "saelens" / "bin" / "python"
    return path if path.exists() else None


def test_saelens_reads_our_folders_and_computes_the_same(tmp_path: Path) -> None:
    python = saelens_python()
    if python is None:
        pytest.skip("no environment with sae-lens (set GREATCTL_SAELENS_PYTHON to its python)")
    truth = dictionary(32, 16)
    x = planted(400, truth, seed=77) / 3.7
    folders = []
    for number, (cls, options) in enumerate(ARCHITECTURES):
        here = tmp_path / str(number)
        trainer = trained(here, cls, planted(4000, truth) / 3.7, d_sae=32, options=options, steps=60)
        trainer.coder.calibrate(trainer.rows.held_out() * trainer.scale)
        save(here / "sae", trainer.coder, trainer.scale, ORIGIN)
        folders.append(here / "sae")
    save_file({"x": x}, tmp_path / "x.safetensors")
    out = tmp_path / "out.safetensors"
    command = [python, "-c", _SAELENS_CHECK, tmp_path / "x.safetensors", out, *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(out)
    for folder in folders:
        sae = load(folder)
        latents = sae.encode(x)
        assert torch.allclose(theirs[f"{folder}/latents"], latents, atol=1e-5)
        assert torch.allclose(theirs[f"{folder}/rebuilt"], sae.decode(latents), atol=1e-5)
