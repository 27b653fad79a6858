"""`patch` end to end on a tiny model: tables, refusals, statistics, and what a kill leaves behind."""

from __future__ import annotations

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

from greatctl.errors import InputError, InterruptedRun, PluginError, StageError, UsageError
from greatctl.events import Event, Run, StopRequest, silent
from greatctl.extend.manager import load_plugins
from greatctl.patching.summary import peak
from greatctl.patching.tables import EFFECTS, cell_table, effect_table
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
    ("two", "12345", "12346", "67", "7"),
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
    assert list(rows) == ["a", "b", "c", "uneven", "two", "same"]
    assert rows["a"]["status"] == "executed" and rows["a"]["tokens"][1:] == list("123456")
    assert rows["uneven"]["status"] == "refused" and "unequal lengths" in rows["uneven"]["reason"]

    panel = result.view["panels"][0]
    assert (panel["metric"], panel["direction"]) == ("logit-diff", "denoising")
    assert len(panel["matrix"]) == 2 and len(panel["matrix"][0]) == len(panel["labels"]) == 7
    assert panel["matrix"][0][0] == 0.0 and [id for id, _ in result.view["refused"]] == [
        "uneven",
        "two",
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
        patch.run(context(tmp_path / "p"), patch.Config(**{**settings, "answer": "78"}))


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

    def deaf(self, layer, residual, interventions=(), *, positions=None):
        return plain(self, layer, residual, (), positions=positions)

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
    if event.kind == "progress" and event.data["done"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

patch.run(t.context(Path({root!r}), emit=emit), t.config(Path({folder!r}), Path({pairs!r})))
"""


def test_a_kill_in_the_middle_costs_one_unit_and_changes_no_byte(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL, LONGER)
    root = tmp_path / "p"
    code = KILLED.format(tests=str(ROOT / "tests"), root=str(root), folder=str(folder), pairs=str(pairs))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    units = root / "results" / "patches" / ".count-resid_pre.partial" / "units"
    assert len(list(units.iterdir())) == 3
    torn = sorted(units.iterdir())[2]
    torn.write_bytes(torn.read_bytes()[:100])
    events: list[Event] = []
    resumed = patch.run(context(root, emit=events.append), config(folder, pairs))
    first = next(e for e in events if e.kind == "progress")
    assert (first.data["already"], first.data["total"]) == (2, 8)
    plain = patch.run(context(tmp_path / "q"), config(folder, pairs))
    assert resumed.artifact and plain.artifact and not (resumed.artifact / "units").exists()
    for name in TABLES:
        assert (resumed.artifact / name).read_bytes() == (plain.artifact / name).read_bytes()
    assert (resumed.artifact / "artifact.json").read_bytes() == (plain.artifact / "artifact.json").read_bytes()


def test_a_stop_request_is_honoured_after_the_unit_in_hand(tmp_path, folder):
    pairs = write_pairs(tmp_path / "count.toml", *EQUAL)
    stop = StopRequest()
    stop.request(signal.SIGINT)
    with pytest.raises(InterruptedRun):
        patch.run(context(tmp_path / "p", stop=stop), config(folder, pairs))
    units = tmp_path / "p" / "results" / "patches" / ".count-resid_pre.partial" / "units"
    assert len(list(units.iterdir())) == 1


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
