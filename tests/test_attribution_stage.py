"""`patch --method`: estimates are ranked, some are run, and no table, picture or page shows them as anything else."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_patch_stage import EQUAL, config, context, reported, save_sae, shown, write_pairs
from tiny_llama import save_tiny

from greatctl.errors import InterruptedRun, UsageError
from greatctl.events import Event, StopRequest
from greatctl.patching.calibration import calibrate, to_verify
from greatctl.patching.units import Units
from greatctl.stages import approximate, edge_cells, patch, sweeps
from greatctl.store.tables import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "count.toml", *EQUAL)


def test_estimates_stand_beside_what_was_run_and_are_never_unlabelled(tmp_path, folder, pairs):
    settings = {"method": "attribution", "verify": 6, "direction": "denoising", "metric": ["logit-diff", "prob"]}
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, **settings))
    truth = patch.run(
        context(tmp_path / "p"), config(folder, pairs, direction="denoising", metric=["logit-diff", "prob"])
    )
    assert result.artifact and truth.artifact and result.artifact.name == "count-resid_pre-attribution"

    key = ("pair", "metric", "layer", "position")
    exact = {tuple(row[k] for k in key): row for row in read_rows(truth.artifact / "effects.parquet")}
    rows = read_rows(result.artifact / "effects.parquet")
    assert {row["method"] for row in rows} == {"attribution"} and {r["method"] for r in exact.values()} == {"exact"}
    assert all(row["approximate"] == pytest.approx(row["effect"]) for row in rows)
    verified = [row for row in rows if row["exact"] is not None]
    assert all(row["exact"] == pytest.approx(exact[tuple(row[k] for k in key)]["effect"], abs=1e-5) for row in verified)
    cells = read_rows(result.artifact / "cells.parquet")
    assert sum(row["exact"] is not None for row in cells) == 2 * 12 and len(cells) == 2 * 14
    assert all(row["exact"] is not None for row in sorted(cells, key=lambda r: -abs(r["mean_effect"]))[:1])

    summary = result.summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["method"] == "attribution" and truth.summary["method"] == "exact"
    found = summary["calibration"]["logit-diff"]["denoising"]
    assert (found["n_top"], found["n_random"]) == (6, 6) and -1 <= found["spearman"] <= 1
    assert summary["peak"]["method"] == "attribution" and summary["peak"]["exact"] is not None

    words = shown(result)
    assert "estimates by gradients, not patches" in words and "rank correlation" in words and "exact" in words
    assert "estimates by" not in shown(truth)
    blocks, sentence = reported(result)
    assert "estimate" in sentence and "estimates from gradients" in blocks[0].text
    assert all("estimates" in block.title for block in blocks if block.kind == "chart")
    assert sum("against exact effects" in block.title for block in blocks if block.kind == "chart") == 2
    blocks, sentence = reported(truth)
    assert not any("estimate" in text for text in (sentence, blocks[0].text, *(block.title for block in blocks[1:3])))


def test_an_interrupted_run_of_estimates_ends_with_the_same_bytes(tmp_path, folder, pairs):
    settings = {"method": "eap-ig", "steps": 2, "site": "z", "verify": 3}
    whole = patch.run(context(tmp_path / "whole"), config(folder, pairs, **settings))
    stop = StopRequest()
    stop.request(signal.SIGINT)
    with pytest.raises(InterruptedRun):
        patch.run(context(tmp_path / "cut", stop=stop), config(folder, pairs, **settings))
    resumed = patch.run(context(tmp_path / "cut"), config(folder, pairs, **settings))
    assert whole.artifact and resumed.artifact
    for name in ("effects.parquet", "cells.parquet"):
        assert (whole.artifact / name).read_bytes() == (resumed.artifact / name).read_bytes()


def test_edges_are_named_estimated_and_run(tmp_path, folder, pairs):
    more = {"site": "edges", "direction": "denoising"}
    named = patch.run(context(tmp_path / "p"), config(folder, pairs, edge=["a0.*->a1.kv1.k", "m1->logits.in"], **more))
    assert named.artifact
    rows = read_rows(named.artifact / "effects.parquet")
    assert {row["edge"] for row in rows} == {*(f"a0.h{h}->a1.kv1.k" for h in range(4)), "m1->logits.in"}
    assert {row["method"] for row in rows} == {"exact"} and len(rows) == 3 * 5
    assert {row["layer"] for row in rows if row["edge"] == "m1->logits.in"} == {2}

    found = patch.run(context(tmp_path / "p"), config(folder, pairs, method="attribution", top=8, verify=4, **more))
    assert found.artifact and "12 of 82 edges are listed" in found.summary["chosen"]
    cells = read_rows(found.artifact / "cells.parquet")
    assert len(cells) == 12 and sum(row["exact"] is not None for row in cells) == 8
    both = {row["edge"]: row["exact"] for row in cells if row["exact"] is not None}
    alike = {row["edge"]: row["mean_effect"] for row in read_rows(named.artifact / "cells.parquet")}
    for edge in both.keys() & alike.keys():
        assert both[edge] == pytest.approx(alike[edge], abs=1e-5)
    blocks, sentence = reported(found)
    assert "->" in shown(found) and "->" in sentence and "exact" in blocks[2].headers


def test_edges_are_estimated_and_run_at_each_position_by_itself(tmp_path, folder, pairs):
    more = {"site": "edges", "edge": ["a0.*->a1.kv1.k", "embed->m1.in"], "direction": "denoising"}
    exact = patch.run(context(tmp_path / "p"), config(folder, pairs, positions="each", **more))
    guess = {"method": "attribution", "verify": 5, **more}
    apart = patch.run(context(tmp_path / "p"), config(folder, pairs, positions="each", **guess))
    whole = patch.run(context(tmp_path / "p"), config(folder, pairs, **guess))
    assert exact.artifact and apart.artifact and whole.artifact and "each" in apart.artifact.name

    tables = [read_rows(one.artifact / "effects.parquet") for one in (exact, apart, whole)]  # type: ignore[operator]
    truth, each = ({(r["pair"], r["edge"], r["position"]): r for r in rows} for rows in tables[:2])
    assert each.keys() == truth.keys() and len(each) == 3 * 5 * 7
    run = [key for key, row in each.items() if row["exact"] is not None]
    assert run and all(each[key]["exact"] == pytest.approx(truth[key]["effect"], abs=1e-5) for key in run)
    for row in tables[2]:
        some = [r["approximate"] for key, r in each.items() if key[:2] == (row["pair"], row["edge"])]
        assert sum(some) == pytest.approx(row["approximate"], abs=1e-6) and row["span"] == "all"

    cells = read_rows(apart.artifact / "cells.parquet")
    assert len(cells) == 5 * 7 and sum(row["exact"] is not None for row in cells) == 10
    found = apart.summary["calibration"]["logit-diff"]["denoising"]
    assert (found["n_top"], found["n_random"], apart.summary["n_positions"]) == (5, 5, 7)
    assert "each position" in shown(apart) and " at -" in shown(apart)
    blocks, sentence = reported(apart)
    assert "position" in sentence and any("position" in str(row[0]) for row in blocks[2].rows)


def test_edges_are_estimated_at_marked_spans(tmp_path, folder):
    pairs = write_pairs(tmp_path / "spans.toml", *EQUAL[:2])
    first, second = pairs.read_text().rsplit("[[pair]]", 1)
    pairs.write_text(f'{first}spans = {{ s = ["34", "54"] }}\n[[pair]]{second}')
    more = {"site": "edges", "edge": ["embed->a0.kv0.v"], "positions": "spans"}
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, method="attribution-qk", **more))
    assert result.artifact
    rows = read_rows(result.artifact / "effects.parquet")
    assert {row["span"] for row in rows} == {"s"} and {row["pair"] for row in rows} == {"a"}


@pytest.mark.parametrize(
    "more",
    [
        {"site": "edges", "method": "attribution", "positions": "each"},
        {"site": "edges", "method": "eap-ig"},
        {"site": "mlp_post"},
    ],
)
def test_a_choice_stands_after_an_interruption_whatever_would_be_chosen_now(tmp_path, folder, pairs, more, monkeypatch):
    settings = {**more, "top": 4, "verify": 2, "steps": 1, "direction": "denoising"}
    whole = patch.run(context(tmp_path / "whole"), config(folder, pairs, **settings))
    kept, done = Units.kept, []

    def killed(units: Units, name: str, make: Callable) -> dict:
        done.append(kept(units, name, make))
        raise KeyboardInterrupt

    monkeypatch.setattr(Units, "kept", killed)
    with pytest.raises(KeyboardInterrupt):
        patch.run(context(tmp_path / "cut"), config(folder, pairs, **settings))
    monkeypatch.setattr(Units, "kept", kept)
    for module, name in ((edge_cells, "drawn"), (approximate, "drawn"), (sweeps, "promising_neurons")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the choice was made again"))
    resumed = patch.run(context(tmp_path / "cut"), config(folder, pairs, **settings))
    assert done and whole.artifact and resumed.artifact and whole.summary["chosen"] == resumed.summary["chosen"]
    for name in ("effects.parquet", "cells.parquet"):
        assert (whole.artifact / name).read_bytes() == (resumed.artifact / name).read_bytes()


@pytest.mark.parametrize("method", ["attribution", "eap-ig-activations"])
def test_neurons_are_chosen_by_their_estimates_and_others_at_random(tmp_path, folder, pairs, method):
    settings = {"site": "mlp_post", "method": method, "steps": 1, "top": 5, "verify": 3, "direction": "denoising"}
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, **settings))
    assert result.artifact and "8 of 96 neurons are listed" in result.summary["chosen"]
    cells = read_rows(result.artifact / "cells.parquet")
    assert len(cells) == 8 and sum(row["exact"] is not None for row in cells) == 6


def test_latents_and_their_error_are_estimated_and_run(tmp_path, folder, pairs):
    sae = save_sae(tmp_path / "mine", model_name=str(folder))
    settings = {
        "site": "latents",
        "sae": str(sae),
        "method": "attribution",
        "top": 4,
        "verify": 20,
        "direction": "denoising",
    }
    result = patch.run(context(tmp_path / "p"), config(folder, pairs, **settings))
    assert result.artifact and "24 of 64 latents are listed" in result.summary["chosen"]
    rows = {row["part"]: row for row in read_rows(result.artifact / "cells.parquet") if row["part"]}
    guess = {part: row["approximate"] for part, row in rows.items()}
    assert guess["all latents"] + guess["error term"] == pytest.approx(guess["latents and error"], abs=1e-5)
    assert all(row["exact"] is not None for row in rows.values())


def test_a_metric_that_is_at_its_minimum_says_that_its_slope_is_nothing(tmp_path, folder, pairs):
    said: list[Event] = []
    settings = {"metric": ["kl"], "method": "attribution", "site": "z", "verify": 0, "direction": "noising"}
    result = patch.run(context(tmp_path / "p", emit=said.append), config(folder, pairs, **settings))
    assert any("kl has no slope" in str(getattr(event, "message", "")) for event in said)
    assert "too few" in result.summary["verified"][0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": ["rank"], "method": "attribution"}, "rank"),
        ({"edge": ["embed->m0.in"]}, "--edge"),
        ({"method": "eap-ig", "corruption": "zero"}, "--corruption"),
        ({"method": "attribution", "layer_window": 2}, "--layer-window"),
        ({"method": "attribution-drop", "site": "edges"}, "attribution-drop"),
        ({"method": "attribution-drop", "circuit": True}, "attribution-drop"),
        ({"site": "edges", "edge": ["a7.h0->m1.in"]}, "a7"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, folder, pairs, settings, words):
    with pytest.raises(UsageError, match=words):
        patch.run(context(tmp_path / "p"), config(folder, pairs, **settings))


def test_cells_are_verified_by_rank_and_at_random_and_compared():
    means = np.array([0.1, -5.0, np.nan, 3.0, 0.2, 0.3])
    top, others = to_verify(means, 2, seed=0)
    assert top == [1, 3] and set(others) < {0, 4, 5} and len(others) == 2
    exact = np.array([1.0, 2.0, 3.0, 4.0])
    found = calibrate(2 * exact + 1, exact, np.array([False, True, True, True]))
    assert (found.spearman, found.n_top, found.n_random) == (1.0, 1, 3)
    assert found.slope == pytest.approx(2) and found.intercept == pytest.approx(1)
    assert calibrate(exact, np.ones(4), np.zeros(4, bool)).slope is None
