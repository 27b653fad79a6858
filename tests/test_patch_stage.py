"""`patch` end to end on a tiny model: tables, refusals, statistics, and what a kill leaves behind."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_llama import make_project, save_tiny

from greatctl.errors import InputError, InterruptedRun, ManifestError, PluginError, StageError, UsageError
from greatctl.events import Event, Run, StopRequest, silent
from greatctl.extend.manager import load_plugins
from greatctl.patching.sites import Label
from greatctl.patching.summary import peak, power, summary
from greatctl.patching.tables import EFFECTS, cell_table, effect_rows, effect_table
from greatctl.stages import patch
from greatctl.stages.context import Context
from greatctl.store.tables import read_columns, read_rows

ROOT = Path(__file__).resolve().parents[1]
TABLES = ("effects.parquet", "cells.parquet", "pairs.parquet")
COLUMNS = [f.name for f in EFFECTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path, num_hidden_layers=2)
    return path


def write_pairs(path: Path, *rows: tuple[str, str, str, str, str]) -> Path:
    """A pair file; the tiny tokenizer reads digits one by one, so their prompts are easy to count."""
    parts = ['concept = "counting"\n']
    for id, clean, corrupted, answer, wrong in rows:
        values = {"id": id, "clean": clean, "corrupted": corrupted, "answer": answer, "wrong_answer": wrong}
        parts.append("[[pair]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
    path.write_text("\n".join(parts))
    return path


EQUAL = (
    ("a", "123456", "125456", "7", "9"),
    ("b", "223456", "224457", "8", "1"),
    ("c", "987654", "981654", "3", "2"),
)
LONGER = ("d", "12345678", "12315678", "9", "6")
REFUSED = (
    ("uneven", "12345", "1234", "6", "5"),
    ("prefix", "12345", "12346", "67", "6"),
    ("same", "12345", "12346", "6", "6"),
)


def context(root: Path, plugins: Any = None, **more: Any) -> Context:
    project = make_project(root, {"wood-b": "text"})
    plugins = plugins or load_plugins(folder=None, enabled=False)
    run = Run("patch", more.pop("emit", silent), more.pop("stop", StopRequest()))
    return Context(project, plugins=plugins, run=run, device="cpu", offline=True, **more)


def config(folder: Path, pairs: Path, **more: Any) -> patch.Config:
    return patch.Config(**{"model": str(folder), "pairs": str(pairs), "min_gap": 0.0, **more})


def test_the_tables_and_the_summary_say_what_was_done(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL, *REFUSED)
    metrics = ["logit-diff", "kl"]
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, metric=metrics))
    assert result.artifact is not None and result.artifact.name == "count-resid_pre"
    effects = read_columns(result.artifact / "effects.parquet")
    assert list(effects) == COLUMNS
    table = {name: np.array(effects[name]) for name in COLUMNS}
    assert len(table["pair"]) == 3 * 2 * 7 * 2 * 2  # pairs, layers, positions with BOS, directions, metrics
    base = np.where(table["direction"] == "denoising", table["corrupted"], table["clean"])
    assert np.allclose(table["effect"], table["patched"] - base)
    gap = table["clean"] - table["corrupted"]
    assert np.allclose(table["normalised_effect"], (table["patched"] - table["corrupted"]) / gap)
    assert (table["position"] - 7 == table["position_from_end"]).all()
    assert (table["effect"][table["position"] < 3] == 0).all()
    only_change = (table["pair"] == "a") & (table["position"] == 3)
    once = only_change & (table["layer"] == 0)
    forwards = table["normalised_effect"][once & (table["direction"] == "denoising")]
    backwards = table["normalised_effect"][once & (table["direction"] == "noising")]
    assert np.allclose(forwards, 1, atol=1e-3) and np.allclose(backwards, 0, atol=1e-3)
    assert table["token"][once][0] == "3"

    summary = result.summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["n_pairs"], summary["n_refused"], summary["metric"]) == (3, 3, "logit-diff")
    assert (summary["site"], summary["n_layers"], summary["n_positions"]) == ("resid_pre", 2, 7)
    assert set(summary["metrics"]) == set(metrics)
    assert summary["metrics"]["kl"]["clean"] == pytest.approx(0, abs=1e-6)
    diff = table["metric"] == "logit-diff"
    assert summary["clean"] == pytest.approx(table["clean"][diff].mean())
    assert {"layer", "position", "effect"} <= set(summary["peak"])
    at = (
        diff
        & (table["direction"] == "denoising")
        & (table["layer"] == summary["peak"]["layer"])
        & (table["position"] == summary["peak"]["position"])
    )
    assert table["effect"][at].mean() == pytest.approx(summary["peak"]["effect"])

    rows = {r["id"]: r for r in read_rows(result.artifact / "pairs.parquet")}
    assert list(rows) == ["a", "b", "c", "uneven", "prefix", "same"]
    assert rows["a"]["status"] == "executed" and rows["a"]["tokens"][1:] == list("123456")
    assert rows["uneven"]["status"] == "refused" and "unequal lengths" in rows["uneven"]["reason"]

    panel = result.view["panels"][0]
    assert (panel["metric"], panel["direction"]) == ("logit-diff", "denoising")
    assert len(panel["matrix"]) == 2 and len(panel["matrix"][0]) == len(panel["labels"]) == 7
    assert panel["matrix"][0][0] == 0.0 and [id for id, _ in result.view["refused"]] == [
        "uneven",
        "prefix",
        "same",
    ]


def test_a_second_run_is_up_to_date_and_another_metric_is_not(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    first = patch.run(context(tmp_path / "p"), config(folder, pairs))
    again = patch.run(context(tmp_path / "p"), config(folder, pairs))
    assert again.up_to_date and again.summary == first.summary and again.view == first.view
    said: list[Event] = []
    other = patch.run(context(tmp_path / "p", emit=said.append), config(folder, pairs, metric=["prob"]))
    assert not other.up_to_date and "config.metric" in said[0].message


def test_prompts_of_different_lengths_are_aligned_at_their_end(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL, LONGER)
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, direction="denoising"))
    assert result.artifact and result.summary["n_positions"] == 9
    cells = read_rows(result.artifact / "cells.parquet")
    assert len(cells) == 2 * 9
    for cell in cells:
        whole = cell["position_from_end"] >= -7
        assert cell["n_pairs"] == (4 if whole else 1)
        assert (cell["p_max_t"] is not None) == whole and cell["position"] is None
        assert (cell["low"] is not None) == whole and cell["floor"] == 2 / 2**4
    assert -7 <= result.summary["peak"]["position"] <= -1


def test_pairs_without_a_gap_are_refused_with_the_number(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    loose = patch.run(context(tmp_path / "p"), config(folder, pairs, direction="denoising"))
    assert loose.artifact
    gaps = {r["pair"]: r["clean"] - r["corrupted"] for r in read_rows(loose.artifact / "effects.parquet")}
    smallest = min(gaps, key=lambda id: abs(gaps[id]))
    bound = abs(gaps[smallest]) * 1.001
    strict = patch.run(context(tmp_path / "p"), config(folder, pairs, direction="denoising", min_gap=bound))
    assert strict.artifact and strict.summary["n_refused"] == 1
    row = next(r for r in read_rows(strict.artifact / "pairs.parquet") if r["id"] == smallest)
    assert row["status"] == "refused" and f"{gaps[smallest]:.3g}" in row["reason"]
    with pytest.raises(InputError, match="none of the 3 pairs"):
        patch.run(context(tmp_path / "p"), config(folder, pairs, direction="denoising", min_gap=1e6))


def test_one_pair_from_the_command_line(tmp_path, folder):
    four = {"clean": "123456", "corrupted": "125456", "answer": "7", "wrong_answer": "9"}
    settings = {"model": str(folder), "min_gap": 0.0, **four}
    result = patch.run(context(tmp_path / "p"), patch.Config(**settings))
    assert result.artifact and result.artifact.name == "given-resid_pre"
    assert result.summary["n_pairs"] == 1 and result.summary["peak"]["low"] is None
    assert result.summary["smallest_p"] == 1.0
    with pytest.raises(UsageError, match="four parts") as caught:
        patch.plan(context(tmp_path / "p"), patch.Config(**{**settings, "answer": None}))
    assert "--answer" in caught.value.why
    with pytest.raises(UsageError, match="none of the 1 pairs"):
        patch.run(context(tmp_path / "p"), patch.Config(**{**settings, "corrupted": "12345"}))


def test_unknown_names_are_refused_before_the_model_is_loaded(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    with pytest.raises(UsageError) as caught:
        patch.plan(context(tmp_path / "p"), config(folder, pairs, metric=["logitdiff"]))
    assert "logit-diff" in caught.value.fix
    with pytest.raises(UsageError) as caught:
        patch.plan(context(tmp_path / "p"), patch.Config(model=str(folder), pairs="greatnes"))
    assert "greatness" in caught.value.fix
    with pytest.raises(InputError):
        patch.plan(context(tmp_path / "p"), config(folder, tmp_path / "none.toml"))


class Plugins:
    """Built-ins and one metric more."""

    def __init__(self, metric: type) -> None:
        self._plugins, self._metric, self.registry = load_plugins(folder=None, enabled=False), metric, self

    def names(self, kind: str) -> list[str]:
        return [*self._plugins.registry.names(kind), "own"]

    def get(self, kind: str, name: str) -> type:
        return self._metric if name == "own" else self._plugins.registry.get(kind, name)

    def digests(self, used: dict) -> dict[str, str]:
        return {"metrics/own": "1"} if "own" in used["metrics"] else {}


def test_a_metric_of_a_plugin_is_used_by_name_and_held_to_its_contract(tmp_path, folder):
    class Top:
        name, unit, differentiable = "own", "logits", True

        def __call__(self, logits, answers):
            return logits.amax(-1)

    class Mean(Top):
        def __call__(self, logits, answers):
            return logits.mean()

    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    result = patch.run(context(tmp_path / "p", Plugins(Top)), config(folder, pairs, metric=["own"]))
    assert result.summary["metric"] == "own" and result.summary["clean"] > 0
    with pytest.raises(PluginError, match="'own'") as caught:
        patch.run(context(tmp_path / "q", Plugins(Mean)), config(folder, pairs, metric=["own"]))
    assert "shape []" in caught.value.why


def test_a_self_check_that_fails_ends_the_stage(tmp_path, folder, monkeypatch):
    from greatctl.model.lean import LeanModel

    plain = LeanModel.resume

    def deaf(self, layer, residual, interventions=(), **how):
        return plain(self, layer, residual, (), **how)

    monkeypatch.setattr(LeanModel, "resume", deaf)
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    with pytest.raises(StageError, match=r"blocks\.0\.hook_resid_pre"):
        patch.run(context(tmp_path / "p"), config(folder, pairs))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_patch_stage as t
from greatctl.stages import patch

def emit(event):
    if event.kind == "progress" and event.data["done"] - event.data["already"] >= 40:
        os.kill(os.getpid(), signal.SIGKILL)

patch.run(t.context(Path({root!r}), emit=emit), t.config(Path({folder!r}), Path({pairs!r}), batch_cells=5))
"""


def test_a_kill_in_the_middle_costs_one_batch_and_changes_no_byte(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL, LONGER)
    root = tmp_path / "p"
    code = KILLED.format(tests=str(ROOT / "tests"), root=str(root), folder=str(folder), pairs=str(pairs))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    units = root / "results" / "patches" / ".count-resid_pre.partial" / "units"
    finished = sorted(units.glob("*.parquet"))
    assert len(finished) >= 3
    torn = finished[-1]
    torn.write_bytes(torn.read_bytes()[:100])
    before = {path.name: path.stat().st_mtime_ns for path in finished[:-1]}
    written: list[str] = []

    def emit(event: Event) -> None:
        if event.kind == "progress":
            kept = {path.name: path.stat().st_mtime_ns for path in units.glob("*.parquet")}
            written.extend(name for name, at in kept.items() if before.get(name) != at and name not in written)

    resumed = patch.run(context(root, emit=emit), config(folder, pairs, batch_cells=5))
    assert torn.name in written and not set(before) & set(written)
    plain = patch.run(context(tmp_path / "q"), config(folder, pairs, batch_cells=5))
    assert resumed.artifact and plain.artifact and not (resumed.artifact / "units").exists()
    for name in TABLES:
        assert (resumed.artifact / name).read_bytes() == (plain.artifact / name).read_bytes()
    assert (resumed.artifact / "artifact.json").read_bytes() == (plain.artifact / "artifact.json").read_bytes()


def test_a_resumed_sweep_keeps_its_batches_whatever_the_memory_is_by_then(tmp_path, folder, monkeypatch):
    from greatctl.stages import sweeps

    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    monkeypatch.setattr(sweeps, "auto_cells", lambda *a, **k: 2)
    stop = StopRequest()
    stop.request(signal.SIGINT)
    with pytest.raises(InterruptedRun):
        patch.run(context(tmp_path / "p", stop=stop), config(folder, pairs))
    monkeypatch.setattr(sweeps, "auto_cells", lambda *a, **k: 3)
    resumed = patch.run(context(tmp_path / "p"), config(folder, pairs))
    monkeypatch.setattr(sweeps, "auto_cells", lambda *a, **k: 2)
    plain = patch.run(context(tmp_path / "q"), config(folder, pairs))
    assert resumed.artifact and plain.artifact
    name = "effects.parquet"
    assert (resumed.artifact / name).read_bytes() == (plain.artifact / name).read_bytes()


def test_a_stop_request_is_honoured_after_the_batch_in_hand(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    stop = StopRequest()
    stop.request(signal.SIGINT)
    with pytest.raises(InterruptedRun):
        patch.run(context(tmp_path / "p", stop=stop), config(folder, pairs))
    units = tmp_path / "p" / "results" / "patches" / ".count-resid_pre.partial" / "units"
    assert len(list(units.glob("*.parquet"))) == 1


def test_seven_batches_or_one_give_the_same_table(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    found = []
    for cells in (2, 64):
        result = patch.run(context(tmp_path / str(cells)), config(folder, pairs, batch_cells=cells))
        assert result.artifact
        found.append(np.array(read_columns(result.artifact / "effects.parquet")["patched"]))
    assert np.abs(found[0] - found[1]).max() <= 1e-5


def planted(n: int, effects: np.ndarray, gaps: np.ndarray) -> pa.Table:
    """Effects of n pairs [n, layers, positions] in one metric, denoising from 0."""
    ids = [f"{i:02d}" for i in range(n)]
    tokens = [["x"] * effects.shape[2]] * n
    zero = np.zeros(n)
    layers = range(effects.shape[1])
    parts = [
        effect_table(ids, tokens, "resid_pre", at, "denoising", {"m": (gaps, zero, effects[:, at])}) for at in layers
    ]
    return pa.concat_tables(parts)


def test_the_mean_normalised_effect_is_a_ratio_of_means_which_one_tiny_gap_cannot_upset():
    gaps = np.array([2.0, 2.0, 2.0, 1e-6])
    effects = np.full((4, 1, 2), 1.0)
    cells = cell_table(planted(4, effects, gaps), draws=200).to_pylist()
    assert cells[0]["normalised_effect"] == pytest.approx(4 / 6, rel=1e-5)
    assert cells[0]["mean_effect"] == 1.0


def test_a_planted_effect_is_the_peak_and_survives_the_correction_while_noise_does_not():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(32, 4, 6))
    effects[:, 2, 3] += 1.5
    cells = cell_table(planted(32, effects, np.full(32, 3.0)), draws=500, seed=1)
    top = peak(cells, "m", "denoising")
    assert (top["layer"], top["position"], top["position_from_end"]) == (2, 3, -3)
    rows = cells.to_pylist()
    assert top["p_max_t"] <= 0.01 and sum(r["p_max_t"] <= 0.05 for r in rows) == 1
    hit = next(r for r in rows if r["layer"] == 2 and r["position"] == 3)
    assert hit["low"] < hit["mean_effect"] < hit["high"] and math.isclose(hit["floor"], 1 / 5001)


def shown(result: Any, width: int = 80) -> str:
    """The terminal's view of a result."""
    from rich.console import Console

    from greatctl.cli.views import render

    console = Console(width=width, no_color=True, record=True, file=io.StringIO())
    console.print(render(result))
    return console.export_text()


def reported(result: Any) -> tuple[list[Any], str]:
    """The report's blocks for a run, and its finding."""
    from greatctl.report.patches import finding, section
    from greatctl.store.artifact import load

    assert result.artifact
    artifact = load(result.artifact)
    return section("mine", artifact), finding("mine", artifact).text


def test_heads_have_a_map_of_layers_and_heads(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, site="v"))
    assert result.artifact and result.artifact.name == "count-v"
    rows = read_rows(result.artifact / "cells.parquet")
    assert {(r["layer"], r["head"]) for r in rows} == {(layer, head) for layer in (0, 1) for head in (0, 1)}
    assert all(r["span"] == "all" and r["position"] is None and r["p_max_t"] is not None for r in rows)
    panel = result.view["panels"][0]
    assert panel["columns"] == "head" and len(panel["matrix"]) == 2 and len(panel["matrix"][0]) == 2
    assert result.summary["looks"] == 4 and result.summary["n_positions"] == 1
    text = shown(result)
    assert "layer / head" in text and max(map(len, text.splitlines())) <= 80
    assert "head" in str(result.summary["peak"]) and "no smallest detectable effect" in " ".join(text.split())
    blocks, sentence = reported(result)
    assert [b.kind for b in blocks] == ["prose", "chart", "chart", "table"] and "head" in sentence
    assert "no smallest detectable effect" in blocks[0].text


def test_a_map_of_many_heads_is_broken_to_fit(tmp_path):
    from rich.console import Console

    from greatctl.cli.views.heat import HeatMap

    view = HeatMap("m", [str(h) for h in range(32)], [(str(at), [0.5] * 32) for at in range(2)], wrap=True, of="head")
    console = Console(width=80, no_color=True, record=True, file=io.StringIO())
    console.print(view)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and text.count("50") == 64 and " 31" in text


def test_the_most_promising_neurons_are_patched_and_their_false_discoveries_held(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, site="mlp_post", top=6, direction="noising"))
    assert result.artifact
    rows = read_rows(result.artifact / "cells.parquet")
    assert len(rows) == 6 and all(r["neuron"] is not None and r["q_value"] >= r["p"] for r in rows)
    assert all(r["p_max_t"] is None and r["looks"] == 6 for r in rows)
    summary = result.summary
    assert "6 of 96 neurons" in summary["chosen"] and summary["correction"] == "false discovery rate"
    assert summary["smallest_p"] == 2 / 2**3 and summary["reachable"] is False and "out of reach" in summary["power"]
    assert "6 of 96 neurons" in shown(result)


def save_sae(path: Path, *, d: int = 32, n: int = 64, hook: str = "blocks.1.hook_resid_pre", **metadata: Any) -> Path:
    """A random ReLU autoencoder in the SAELens layout."""
    import torch
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(2)
    path.mkdir(parents=True)
    W = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    tensors = {"W_enc": W.T.contiguous() * 2, "b_enc": torch.zeros(n), "W_dec": W, "b_dec": torch.zeros(d)}
    save_file(tensors, path / "sae_weights.safetensors")
    cfg = {"architecture": "standard", "d_in": d, "d_sae": n, "dtype": "float32", "apply_b_dec_to_input": True}
    (path / "cfg.json").write_text(
        json.dumps({**cfg, "metadata": {"sae_lens_version": "6.54.12", "hook_name": hook, **metadata}})
    )
    return path


def test_latents_of_an_sae_are_patched_at_its_hook_point(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    sae = save_sae(tmp_path / "mine", model_name=str(folder))
    settings = {"site": "latents", "sae": str(sae), "metric": ["logit-diff", "kl"]}
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, top=5, **settings))
    assert result.artifact
    rows = [r for r in read_rows(result.artifact / "cells.parquet") if r["metric"] == "logit-diff"]
    assert {r["layer"] for r in rows} == {1} and len({r["latent"] for r in rows if r["latent"] is not None}) == 5
    parts = {r["part"]: r for r in rows if r["part"] and r["direction"] == "denoising"}
    assert set(parts) == {"all latents", "error term", "latents and error", "reconstruction"}
    whole = patch.run(context(tmp_path / "p"), config(folder, pairs, positions="all"))
    assert whole.artifact and whole.artifact.name == "count-resid_pre-all"
    truth = next(r for r in read_rows(whole.artifact / "cells.parquet") if r["layer"] == 1)
    assert parts["latents and error"]["mean_effect"] == pytest.approx(truth["mean_effect"], abs=1e-5)
    assert (result.summary["sae"], result.summary["hook_point"]) == ("mine", "blocks.1.hook_resid_pre")
    assert "latent" in result.summary["peak"] and "5 of 64 latents" in result.summary["chosen"]
    text = shown(result)
    assert "error term" in text and "latent" in text and max(map(len, text.splitlines())) <= 80
    blocks, sentence = reported(result)
    assert [b.kind for b in blocks] == ["prose", *["table"] * 5] and "latent" in sentence
    assert len(blocks[1].rows) == 5 + 4 and "5 of 64 latents" in blocks[0].text
    named = patch.run(context(tmp_path / "q"), config(folder, pairs, latent=[7], **settings))
    assert named.artifact and "chosen" not in named.summary
    assert {r["latent"] for r in read_rows(named.artifact / "cells.parquet")} == {7, None}


def test_an_sae_of_another_model_and_settings_that_do_not_go_together_are_refused(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    ctx = context(tmp_path / "p")
    other = save_sae(tmp_path / "other", model_name="somebody/else")
    with pytest.raises(InputError, match="was not trained on"):
        patch.plan(ctx, config(folder, pairs, site="latents", sae=str(other)))
    wide = save_sae(tmp_path / "wide", d=48)
    with pytest.raises(InputError, match="was not trained on"):
        patch.plan(ctx, config(folder, pairs, site="latents", sae=str(wide)))
    fine = save_sae(tmp_path / "fine")
    for wrong, said in (
        ({"site": "latents", "sae": str(fine), "latent": [64]}, "no latent 64"),
        ({"layer_window": 3}, "too wide"),
    ):
        with pytest.raises(
            ManifestError, match=said
        ):  # a number out of range is exit 3, here as at every other command
            patch.plan(ctx, config(folder, pairs, **wrong))
    for wrong, said in (
        ({"site": "z", "latent": [1]}, "--latent do not go"),
        ({"site": "z", "layer_window": 2}, "--layer-window does not go"),
        ({"corruption": "zero", "direction": "denoising"}, "cannot be denoised"),
    ):
        with pytest.raises(UsageError, match=said):
            patch.plan(ctx, config(folder, pairs, **wrong))


@pytest.mark.parametrize("corruption", ["zero", "mean", "resample"])
def test_an_ablation_is_noising_on_the_scale_of_the_pair(tmp_path, folder, corruption):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL, LONGER)
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, site="mlp_out", corruption=corruption))
    assert result.artifact and result.artifact.name == f"count-mlp_out-{corruption}"
    effects = read_rows(result.artifact / "effects.parquet")
    assert {r["direction"] for r in effects} == {"noising"} and result.summary["corruption"] == corruption
    assert any(abs(r["effect"]) > 1e-6 for r in effects if r["position"] == 1)  # before the first difference, too
    assert {r["pair"] for r in effects} == {"a", "b", "c", "d"}


def test_windows_are_rows_besides_the_single_layers(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, site="attn_out", layer_window=2))
    assert result.artifact
    rows = read_rows(result.artifact / "cells.parquet")
    assert {r["layers"] for r in rows} == {None, "0-1"} and result.summary["looks"] == 3 * 7
    assert [p["windows"] for p in result.view["panels"]] == [False, True, False, True]
    assert "layers" not in result.summary["peak"] and "window of layers" in shown(result)


def test_marked_spans_and_unequal_prompts_are_cells_of_their_names(tmp_path, folder):
    path = tmp_path / "spans.toml"
    path.write_text(
        '[[pair]]\nid = "a"\nclean = "123456"\ncorrupted = "12956"\nanswer = "7"\nwrong_answer = "9"\n'
        'spans = { middle = ["34", "9"] }\n'
        '[[pair]]\nid = "b"\nclean = "723456"\ncorrupted = "72156"\nanswer = "7"\nwrong_answer = "9"\n'
        'spans = { middle = ["34", "1"] }\n'
    )
    result = patch.run(context(tmp_path / "p"), config(folder, path, positions="spans"))
    assert result.artifact and result.summary["n_pairs"] == 2
    rows = read_rows(result.artifact / "cells.parquet")
    assert {r["span"] for r in rows} == {"middle"} and len(rows) == 2 * 2
    assert "middle" in shown(result)
    each = patch.run(context(tmp_path / "p"), config(folder, path))
    assert each.artifact
    absent = {r["position"] for r in read_rows(each.artifact / "cells.parquet")}
    assert 3 not in absent and {4, 5, 6} <= absent
    assert {(r["position"], r["role"]) for r in read_rows(each.artifact / "effects.parquet")} >= {
        (4, "middle"),
        (5, None),
    }


def test_answers_of_several_tokens_and_sets_are_swept_to_the_end(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL, ("several", "123456", "125456", "78", "99"))
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, metric=["logit-diff", "prob", "kl"]))
    assert result.artifact and result.summary["n_pairs"] == 4


def test_every_cell_has_its_own_place_in_the_table() -> None:
    """Heads, spans and windows of one table are not mixed up, and absent cells are absent."""
    ones, zero = np.ones(2), np.zeros(2)
    cube = np.arange(12.0).reshape(2, 3, 2)
    cube[1, :, 1] = np.nan
    labels, places = [Label(head=h) for h in range(3)], [(None, "x"), (None, "y")]
    table = effect_rows(["p", "q"], [["t"]] * 2, "z", (4,), "denoising", labels, places, {"m": (ones, zero, cube)})
    assert len(table) == 9
    cells = {(r["layer"], r["head"], r["span"]): r for r in cell_table(table, draws=50).to_pylist()}
    assert len(cells) == 6 and cells[4, 2, "x"]["mean_effect"] == (4 + 10) / 2
    assert cells[4, 1, "y"]["n_pairs"] == 1 and cells[4, 1, "y"]["p_max_t"] is None and cells[4, 0, "x"]["looks"] == 3


def test_pairs_of_one_cluster_are_one_unit() -> None:
    rng = np.random.default_rng(0)
    table = planted(12, rng.normal(size=(12, 1, 2)), np.ones(12))
    alone = cell_table(table, draws=100).to_pylist()
    twins = cell_table(table, draws=100, clusters={f"{i:02d}": i // 4 for i in range(12)}).to_pylist()
    assert alone[0]["floor"] == 1 / 2**11 and twins[0]["floor"] == 1 / 2**2


def test_a_metric_that_can_only_move_one_way_gets_no_p_value() -> None:
    """KL from the clean run is 0 there; any edit raises it, so flipped signs would find an effect in every cell."""
    effects = np.abs(np.random.default_rng(0).normal(size=(20, 2, 3)))
    cells = cell_table(planted(20, effects, np.ones(20)), draws=100)
    assert all(r["p_max_t"] is None and r["p"] is None and r["low"] > 0 for r in cells.to_pylist())
    ends = {"m": [(1.0, 0.0)] * 20}
    assert summary(cells, ends, n_refused=0)["untested"] == ["m, denoising"]


def test_held_out_pairs_do_not_choose_and_the_choice_is_called_exploration(tmp_path, folder):
    """Neurons are chosen on the other pairs; with none held out, the sentence says that the same pairs choose and test."""
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    same = patch.run(context(tmp_path / "p"), config(folder, pairs, site="mlp_post", top=3))
    assert "chosen on the same pairs" in str(same.summary["chosen"]) and "exploration" in shown(same)
    apart = tmp_path / "apart.toml"
    apart.write_text(pairs.read_text().replace('id = "a"\n', 'id = "a"\nheldout = true\n'))
    alone = write_pairs(tmp_path / "alone.toml", *EQUAL[1:])

    def neurons(file: Path) -> set[tuple[int, int]]:
        made = patch.run(context(tmp_path / file.stem), config(folder, file, site="mlp_post", top=3))
        assert made.artifact
        return {(row["layer"], row["neuron"]) for row in read_rows(made.artifact / "cells.parquet")}

    held = patch.run(context(tmp_path / "apart"), config(folder, apart, site="mlp_post", top=3))
    assert "the 2 pairs that are not held out" in str(held.summary["chosen"]) and held.summary["n_pairs"] == 3
    assert neurons(apart) == neurons(alone)


def test_power_speaks_of_clusters_and_promises_nothing_out_of_reach() -> None:
    words = power(12, 72, 0.5, n_units=2)
    assert (
        "12 pairs in 2 clusters there is no smallest detectable effect" in words and "standard deviations" not in words
    )
    words = power(40, 72, 0.0002, n_units=20)
    assert "40 pairs in 20 clusters the smallest detectable effect" in words and "clusters' effects" in words
    found = summary(cell_table(planted(3, np.ones((3, 1, 2)), np.ones(3))), {"m": [(1.0, 0.0)] * 3}, n_refused=0)
    assert found["reachable"] is False and found["smallest_detectable_effect"] is None


def test_one_pair_has_no_p_value(tmp_path, folder):
    pairs = write_pairs(tmp_path / "one.toml", EQUAL[0])
    result = patch.run(context(tmp_path / "p"), config(folder, pairs))
    assert result.artifact and {r["p"] for r in read_rows(result.artifact / "cells.parquet")} == {None}
    assert result.summary["peak"]["p_max_t"] is None and "1 pair no effect can be tested" in result.summary["power"]
    assert "from that end the metric" not in shown(result)


def test_two_saes_have_two_folders_and_the_first_metric_comes_first(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    names = []
    for name in ("one", "two"):
        sae = save_sae(tmp_path / name, model_name=str(folder))
        settings = {"site": "latents", "sae": str(sae), "top": 2, "metric": ["logit-diff", "kl"]}
        result = patch.run(context(tmp_path / "p"), config(folder, pairs, **settings))
        assert result.artifact
        names.append(result.artifact.name)
    assert names == ["count-latents-one", "count-latents-two"]
    text = shown(result)
    assert 0 <= text.index("logit-diff, denoising") < text.index("kl, denoising")


def test_hostile_texts_are_written_out(tmp_path, folder):
    """Escape sequences of a pair reach neither the terminal nor the page."""
    row = {
        "id": "\x1b[31mx[/bold]",
        "clean": "12\x1b3456",
        "corrupted": "12\x1b3956",
        "answer": "7",
        "wrong_answer": "9",
    }
    bad = {**row, "id": "\x1b]0;</script>", "corrupted": "1"}
    path = tmp_path / "hostile.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(bad) + "\n")
    result = patch.run(context(tmp_path / "p"), config(folder, path))
    assert "\x1b" not in shown(result) and "</script>" in shown(result)
    blocks, _ = reported(result)
    assert "\x1b" not in str([getattr(block, "rows", None) for block in blocks]) and "\\x1b" in blocks[-1].rows[0][0]


def test_names_of_spans_are_not_cut(tmp_path, folder):
    path = tmp_path / "spans.toml"
    path.write_text(
        '[[pair]]\nid = "a"\nclean = "123456"\ncorrupted = "129456"\nanswer = "7"\nwrong_answer = "9"\n'
        'spans = { protagonist = ["3", "9"] }\n'
    )
    result = patch.run(context(tmp_path / "p"), config(folder, path, positions="spans"))
    text = shown(result)
    assert "protagonist" in text and "protag…" not in text and " -0 " not in text


def test_a_long_token_does_not_run_out_of_the_map() -> None:
    from greatctl.report.patches import _labels

    rows = [{"status": "executed", "tokens": ["<|begin_of_text|>", " was"]}]
    assert _labels(rows, [-2, -1]) == ["<|begin_o… -2", "was -1"]
