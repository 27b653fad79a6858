"""`patch --circuit` end to end: tables, summary, an edited file, the terminal, the report; and the copying pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repeat_copy import swapped_pairs, train
from rich.console import Console
from tiny_llama import make_project, save_tiny

from greatctl.cli.views.circuits import render_circuit
from greatctl.errors import InputError, UsageError
from greatctl.events import Run, StopRequest, silent
from greatctl.extend.manager import load_plugins
from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.model.tokenizer import encode, load_tokenizer
from greatctl.patching.components import GraphRuns
from greatctl.patching.copying import copying_pairs, previous_token_scores, swapped, two_step
from greatctl.patching.edges import edge_effects
from greatctl.patching.faithfulness import Ends
from greatctl.patching.metrics import LogitDiff
from greatctl.patching.pairs import encode_pairs
from greatctl.patching.scoring import score
from greatctl.patching.study import choose, judge, split, verdict
from greatctl.patching.units import groups
from greatctl.patching.writes import edge_group
from greatctl.reference import model_dir
from greatctl.report import circuits as told
from greatctl.report.page import render
from greatctl.report.view import Section, View
from greatctl.stages import patch
from greatctl.stages.context import Context
from greatctl.store.artifact import load
from greatctl.store.tables import read_columns, read_rows

PAIRS = (("a", "123456", "125456", "7", "9"), ("b", "223456", "224457", "8", "1"), ("c", "987654", "981654", "3", "2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "count.jsonl"
    keys = ("id", "clean", "corrupted", "answer", "wrong_answer")
    rows = [{**dict(zip(keys, row, strict=True)), "heldout": row[0] == "c"} for row in PAIRS]
    rows.append({**rows[0], "id": "uneven", "corrupted": "1234"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def context(root: Path) -> Context:
    project = make_project(root, {"wood-b": "text"})
    run = Run("patch", silent, StopRequest())
    return Context(project, plugins=load_plugins(folder=None, enabled=False), run=run, device="cpu", offline=True)


def config(folder: Path, pairs: Path, **more: Any) -> patch.Config:
    settings = {"model": str(folder), "pairs": str(pairs), "min_gap": 0.0, "random_sets": 30, "circuit": True}
    return patch.Config(**{**settings, **more})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, folder: Path, pairs: Path) -> Any:
    root = tmp_path_factory.mktemp("project")
    return context(root), patch.run(context(root), config(folder, pairs))


def test_a_circuit_of_edges_is_found_and_written_down(found: Any) -> None:
    _, result = found
    assert result.artifact.name == "count-circuit-edges"
    summary = result.summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    fixed = {"n_pairs", "n_refused", "metric", "site", "n_layers", "n_positions", "clean", "corrupted", "peak"}
    assert fixed <= set(summary) and {"layer", "position", "effect"} <= set(summary["peak"])
    circuit = summary["circuit"]
    assert (summary["n_pairs"], summary["n_refused"], circuit["chosen_on"], circuit["judged_on"]) == (3, 1, 2, 1)
    assert circuit["approximate"] and circuit["scores"] == "eap-ig" and circuit["held_out"]
    file = json.loads((result.artifact / "circuit.json").read_text())
    assert len(file["components"]) == circuit["size"] and file["ablation"] == "counterpart"
    curve = read_rows(result.artifact / "curve.parquet")
    assert {row["ablation"] for row in curve} == {"counterpart", "mean"} and len(curve) == 20
    assert all(row["faithfulness"] == pytest.approx(1, abs=1e-3) for row in curve if row["share"] == 1)
    table = read_columns(result.artifact / "faithfulness.parquet")
    at = [s == "circuit" and p == "c" and a == "counterpart" for s, p, a in
          zip(table["set"], table["pair"], table["ablation"], strict=True)]  # fmt: skip
    assert np.array(table["faithfulness"])[at] == pytest.approx([circuit["faithfulness"]["value"]])
    assert len(read_rows(result.artifact / "random_sets.parquet")) == 30


def test_the_same_again_is_up_to_date_and_the_plan_is_the_run_s(found: Any, folder: Path, pairs: Path) -> None:
    ctx, result = found
    again = patch.run(ctx, config(folder, pairs))
    assert again.up_to_date and again.summary == result.summary
    planned = patch.plan(ctx, config(folder, pairs))
    assert planned.final == result.artifact and planned.identity.fingerprint == load(result.artifact).fingerprint


def test_an_edited_circuit_is_tested_as_it_stands(found: Any, folder: Path, pairs: Path, tmp_path: Path) -> None:
    ctx, result = found
    value = json.loads((result.artifact / "circuit.json").read_text())
    value["components"] = ["embed->logits.in"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(value))
    tested = patch.run(ctx, config(folder, pairs, circuit=False, circuit_file=path))
    assert tested.artifact.name == "count-circuit-edges-tested"
    circuit = tested.summary["circuit"]
    assert circuit["components"] == ["embed->logits.in"] and circuit["selection"] == "by hand"
    assert abs(circuit["faithfulness"]["value"]) < 0.5 and result.summary["circuit"] != circuit
    for change, message in (
        ({"model_revision": "0" * 40}, "another model"),
        ({"components": ["a9.h9->logits.in"]}, "a9.h9"),
    ):
        path.write_text(json.dumps({**value, **change}))
        with pytest.raises(InputError, match=message):
            patch.run(ctx, config(folder, pairs, circuit_file=path))


def test_nodes_are_scored_exactly_and_zeros_may_stand_outside(folder: Path, pairs: Path, tmp_path: Path) -> None:
    ctx = context(tmp_path / "p")
    result = patch.run(ctx, config(folder, pairs, circuit_kind="nodes", corruption="zero", circuit_size=3))
    circuit = result.summary["circuit"]
    assert result.artifact and result.artifact.name == "count-circuit-nodes-zero"
    assert circuit["size"] == 3 and circuit["of"] == 10 and not circuit["approximate"]
    assert circuit["ablation"] == "zero" and circuit["other_ablation"]["ablation"] == "counterpart"


def test_settings_that_do_not_go_together_are_refused(folder: Path, pairs: Path, tmp_path: Path) -> None:
    ctx = context(tmp_path / "p")
    for more in ({"metric": ["logit-diff", "prob"]}, {"corruption": "resample"}, {"latent": [3]}):
        with pytest.raises(UsageError):
            patch.plan(ctx, config(folder, pairs, **more))
    with pytest.raises(InputError, match="no sparse autoencoder"):
        patch.plan(ctx, config(folder, pairs, circuit_kind="latents"))


def test_the_terminal_shows_the_verdict_and_the_curve_in_eighty_columns(found: Any) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_circuit(found[1]))
    text = console.export_text()
    assert found[1].summary["circuit"]["verdict"][:40] in text and "CPR" in text and "share kept" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_report_draws_the_circuit_and_escapes_what_it_says(found: Any) -> None:
    artifact = load(found[1].artifact)
    blocks = told.section("<b>count</b>", artifact)
    page = render(View("t", "s", [told.finding("<i>x", artifact)], [Section("patching", "Patching", blocks)]))
    assert "<svg" in page and "slot-logits" in page and "<b>count" not in page and "&lt;b&gt;count" in page
    drawing = next(block for block in blocks if block.kind == "drawing")
    assert drawing.lines and all(line.y1 > line.y2 for line in drawing.lines)  # the stream runs upwards
    assert len({(box.x, box.y) for box in drawing.boxes}) == len(drawing.boxes)


def test_keys_of_a_group_are_drawn_to_each_of_its_heads() -> None:
    rows = [{"component": name, "score": 1.0} for name in ("a0.h0->a1.kv0.k", "a1.h0->logits.in", "a1.h1->logits.in")]
    found = told.drawing("t", rows, {"kind": "edges", "n_heads": 4, "n_kv_heads": 2})
    assert sum(line.slot == "k" for line in found.lines) == 2 and len(found.lines) == 4
    assert "estimate" not in str(found)
    about = {"kind": "edges", "n_heads": 4, "n_kv_heads": 2, "approximate": True, "scores": "eap-ig"}
    guessed = told.drawing("t", rows, about)
    assert "estimates by eap-ig" in guessed.words and all("estimated" in line.about for line in guessed.lines)


def test_copying_pairs_hold_the_same_words_and_swap_the_answer() -> None:
    tokenizer = load_tokenizer(model_dir(), offline=True)
    made = copying_pairs(tokenizer, lambda text: encode(tokenizer, text), n=16)
    encoded, refused = encode_pairs(made, lambda text: encode(tokenizer, text))
    assert len(encoded) == 16 and not refused and sum(pair.heldout for pair in made) == 8
    assert len({pair.length for pair in encoded}) == 1
    for pair in encoded:
        last = pair.clean_ids[-1]
        assert last == pair.corrupted_ids[-1] and sorted(pair.clean_ids) == sorted(pair.corrupted_ids)
        assert pair.clean_ids[pair.clean_ids.index(last) + 1] == pair.answer_id
        assert pair.corrupted_ids[pair.corrupted_ids.index(last) + 1] == pair.wrong_answer_id
    distances = {len(ids) - 1 - ids.index(ids[-1]) for ids in (pair.clean_ids for pair in encoded)}
    assert distances == {9, 10, 11, 12}  # no fixed distance copies them all


def test_two_steps_want_a_turn_of_mind_and_the_keys_of_previous_token_heads() -> None:
    attention = {"a0.h0": 0.9, "a0.h1": 0.1}
    clean, corrupted = np.full(8, 5.0), np.full(8, -5.0)
    keys = {"a0.h0->a1.kv0.k": 0.9, "a0.h1->a1.kv0.k": 0.0, "a0.h0->a1.kv0.v": 0.0}
    assert two_step(keys, attention, clean, corrupted).found
    by_another = {"a0.h0->a1.kv0.k": 0.0, "a0.h1->a1.kv0.k": 0.9, "a0.h0->a1.kv0.v": 0.9}
    assert "carry 0.00" in two_step(by_another, attention, clean, corrupted).why
    by_place = two_step(keys, attention, clean, clean - 0.01)
    assert not by_place.found and "does not copy by what it reads" in by_place.why


def repeat_copy_study(periods: tuple[int, ...], length: int, trained: tuple[int, int], steps: int) -> Any:
    """Accuracy, the verdict on two steps, and the circuit of edges of a model trained on repeats."""
    torch.set_num_threads(1)
    hf, accuracy = train(trained, steps)
    c = hf.config
    info = ModelInfo("copy", "0", "llama", c.num_hidden_layers, c.hidden_size, c.vocab_size, 64, "float32")
    model, metric = LeanModel(hf, info, None, []), ("logit-diff", LogitDiff())
    pairs = swapped_pairs(32, periods, length)
    parts = [*groups([p for p in pairs if not p.pair.heldout]), *groups([p for p in pairs if p.pair.heldout])]
    runs = GraphRuns(model, parts, metric, "counterpart", "edges")
    ends, rows = Ends.of(runs), split([pair.pair.heldout for pair in runs.pairs])
    found = edge_effects(model, edge_group(model, parts[1]), dict([metric]), "denoising")
    clean, corrupted = (side["logit-diff"].numpy() for side in (found.clean, found.corrupted))
    moved = found.values["logit-diff"][:, :, 0].numpy() - corrupted[:, None]
    effects = dict(zip([e.name for e in found.edges], moved.sum(0) / (clean - corrupted).sum(), strict=True))
    steps_found = two_step(effects, previous_token_scores(model, parts[0]), clean, corrupted)
    scores = score(runs, "edges", rows[0], metric)
    keep = choose(runs, ends, scores, rows[0], selection="greedy", wiring=runs.wiring)
    judged = judge(runs, ends, keep, scores, rows, [p.pair.id for p in runs.pairs], wiring=runs.wiring)
    return accuracy, steps_found, judged, [runs.names[at] for at in np.flatnonzero(keep)]


@pytest.mark.slow
def test_the_trained_model_copies_in_two_steps() -> None:
    accuracy, steps, judged, names = repeat_copy_study((9, 10, 11, 12), 16, (7, 16), 1500)
    assert accuracy > 0.9 and steps.found, steps.why
    assert judged.f.mean[0] > 0.85 and judged.left.mean[0] < 0.15 and judged.sufficiency.p < 1e-3
    assert any(name in steps.edges for name in names) and len(names) < 20


@pytest.mark.slow
def test_the_positional_shortcut_is_not_mistaken_for_induction() -> None:
    accuracy, steps, judged, _ = repeat_copy_study((16,), 26, (16, 16), 300)
    assert accuracy > 0.95  # from outside it copies just as well
    assert not steps.found and "does not copy by what it reads" in steps.why and steps.carried < 0.25
    assert verdict(judged, "edges", held_out=True).startswith("no ")


def test_the_swap_leaves_the_fixed_distance_alone() -> None:
    clean, corrupted, right, wrong = swapped(range(50), 16, 26, random.Random(1))
    assert clean[26 - 16] == corrupted[26 - 16] == right and wrong in clean and clean[-1] == corrupted[-1]


def test_many_small_key_edges_may_carry_it_together() -> None:
    attention = {f"a0.h{head}": 0.9 for head in range(40)}
    keys = {f"a0.h{head}->a1.kv0.k": 0.01 for head in range(40)}
    found = two_step(keys, attention, np.full(8, 5.0), np.full(8, -5.0))
    assert found.found and not found.edges and "39 more key edges" in found.why


def test_an_unknown_set_of_pairs_names_copying_too(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pairs are called 'copyin'") as caught:
        patch.plan(context(tmp_path / "p"), patch.Config(model=str(folder), pairs="copyin"))
    assert "'copying'" in str(caught.value.fix) and "copying" in str(caught.value.why)


def test_scores_that_are_estimates_say_so_in_every_table(found: Any) -> None:
    _, result = found
    assert result.summary["peak"]["approximate"] and result.summary["peak"]["method"] == "eap-ig"
    for name in ("components", "minimality"):
        assert set(read_columns(result.artifact / f"{name}.parquet")["method"]) == {"eap-ig"}
    assert set(read_columns(result.artifact / "components.parquet")["approximate"]) == {True}
