"""The export for other tools: what stands in a batch is what the tables say, and what was not measured is empty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_features_page import folder as folder  # a fixture
from test_features_page import tables as tables  # a fixture

from greatctl.features.neuronpedia import Origin, write_neuronpedia
from greatctl.features.tables import FeatureTables
from greatctl.store.tables import read_rows, write_table

ORIGIN = Origin("tiny", 3, "topk-64", 40, 12, "books")


def batches(target: Path) -> list[Any]:
    return [json.loads(p.read_text()) for p in sorted(target.glob("batch-*.json"), key=lambda p: int(p.stem[6:]))]


def test_every_latent_that_fires_is_written_in_batches(
    folder: Path, tables: FeatureTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greatctl.features.neuronpedia.BATCH", 3)
    (tmp_path / "batch-99.json").write_text("of an earlier export")
    said: list[tuple[int, int]] = []
    count = write_neuronpedia(folder, tmp_path, ORIGIN, {}, lambda *now: said.append(now))
    found = batches(tmp_path)
    fired = tables.fired.nonzero().squeeze(1).tolist()
    assert [f["feature_index"] for b in found for f in b["features"]] == fired and count == len(fired)
    assert len(found) == -(-count // 3) == len(said) and said[-1] == (count, count)
    assert all((b["model_id"], b["layer"], b["sae_set"]) == ("tiny", 3, "topk-64") for b in found)
    assert (tmp_path / "explanations.jsonl").read_text() == ""


def test_a_feature_says_what_the_tables_say(folder: Path, tables: FeatureTables, tmp_path: Path) -> None:
    write_neuronpedia(folder, tmp_path, ORIGIN, {})
    (batch,) = batches(tmp_path)
    feature = next(f for f in batch["features"] if f["feature_index"] == 3)
    facts = next(row for row in read_rows(folder / "latents.parquet") if row["latent"] == 3)
    rows = [r for r in read_rows(folder / "examples.parquet") if r["latent"] == 3 and r["kind"] != "near"]
    assert feature["frac_nonzero"] == facts["density"] and feature["n_prompts_total"] == 40
    heights, values = feature["freq_hist_data_bar_heights"], feature["freq_hist_data_bar_values"]
    assert len(heights) == len(values) and sum(heights) == facts["fired"] and values == sorted(values)
    assert feature["neuron_alignment_indices"] == [] == feature["logits_hist_data_bar_heights"]
    assert len(feature["activations"]) == len(rows)
    for activation, row in zip(feature["activations"], rows, strict=True):
        assert activation["tokens"] == row["pieces"]
        assert activation["values"][activation["qualifying_token_index"]] == pytest.approx(row["activation"], abs=6e-4)
        if row["kind"] == "top":
            assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
            assert activation["bin_max"] == pytest.approx(facts["max"])
        else:
            assert activation["bin_min"] < row["activation"] <= activation["bin_max"] + 1e-6
    tenths = {a["bin_min"]: a["bin_contains"] for a in feature["activations"] if a["bin_contains"] >= 0}
    assert all(0 <= share <= 1 for share in tenths.values()) and sum(tenths.values()) <= 1.001


def test_a_share_counts_the_tokens_of_its_tenth() -> None:
    from greatctl.features.neuronpedia import _share
    from greatctl.features.tables import BINS, bin_edges

    edges, counts = bin_edges(), [0] * BINS
    counts[20], counts[22] = 30, 10
    assert _share(counts, edges[20], edges[21]) == 0.75 and _share(counts, edges[22], 1e9) == 0.25
    middle = (edges[20] + edges[21]) / 2
    assert _share(counts, 0, middle) == 0.375 and _share([0] * BINS, 0, 1) == 0


def test_only_what_a_labeler_said_is_an_explanation(folder: Path, tmp_path: Path) -> None:
    row = {"latent": 3, "name": "kings", "description": "words about kings", "source": "labeler", "labeler": "m"}
    scores = {"detection": 0.9, "detection_low": 0.7, "detection_high": 1.0, "detection_shuffled": 0.5}
    scores |= {"n_detection": 20, "fuzzing": None}
    labels = {3: {**row, **scores}, 4: {**row, "latent": 4, "source": "fallback"}}
    write_neuronpedia(folder, tmp_path, ORIGIN, labels)
    (line,) = (tmp_path / "explanations.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "modelId": "tiny",
        "layer": "3-topk-64",
        "index": "3",
        "description": "kings: words about kings",
        "typeName": "greatctl_passages",
        "explanationModelName": "m",
        "scores": [
            {
                "explanationScoreTypeName": "greatctl_detection",
                "explanationScoreModelName": "m",
                "value": 0.9,
                "low": 0.7,
                "high": 1.0,
                "shuffled": 0.5,
                "n": 20,
            }
        ],
    }


def test_an_sae_without_logits_is_exported_too(folder: Path, tmp_path: Path) -> None:
    for name in ("latents", "examples"):
        write_table(tmp_path / f"{name}.parquet", pa.Table.from_pylist(read_rows(folder / f"{name}.parquet")))
    write_neuronpedia(tmp_path, tmp_path / "out", ORIGIN, {})
    assert all(f["pos_str"] == [] == f["neg_values"] for b in batches(tmp_path / "out") for f in b["features"])


# what Neuronpedia's converter takes out of a batch by name, without asking whether it is there
BATCH_KEYS = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
FEATURE_KEYS = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices",
    "correlated_features_pearson", "correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist", "activations", "n_prompts_total", "n_tokens_in_prompt",
    "dataset",
}  # fmt: skip
ACTIVATION_KEYS = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


def test_every_field_that_a_converter_wants_is_there(folder: Path, tmp_path: Path) -> None:
    write_neuronpedia(folder, tmp_path / "out", ORIGIN, {})
    for batch in batches(tmp_path / "out"):
        assert set(batch) == BATCH_KEYS
        for feature in batch["features"]:
            assert set(feature) == FEATURE_KEYS and feature["activations"]
            assert len(feature["pos_str"]) == len(feature["pos_values"])
            for activation in feature["activations"]:
                assert set(activation) == ACTIVATION_KEYS and max(activation["values"]) > 0
                assert (
                    len(activation["tokens"]) == len(activation["values"]) > activation["qualifying_token_index"] >= 0
                )


def test_numbers_that_are_not_finite_are_null_and_hostile_tokens_come_back_as_they_were(
    folder: Path, tmp_path: Path
) -> None:
    hostile = '</script>\x1b]0;x\x07\u202e\u2028"\\'
    for name in ("latents", "examples"):
        rows = read_rows(folder / f"{name}.parquet")
        for row in rows:
            if name == "latents":
                row |= {"top_logits": [float("nan"), float("inf")], "top_logit_tokens": [hostile, "b"]}
            else:
                row["pieces"] = [hostile] * len(row["pieces"])
        write_table(tmp_path / f"{name}.parquet", pa.Table.from_pylist(rows))
    write_neuronpedia(tmp_path, tmp_path / "out", ORIGIN, {})
    for path in (tmp_path / "out").glob("batch-*.json"):
        (line,) = path.read_text().split("\n")[:-1]
        batch = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        for feature in batch["features"]:
            assert feature["pos_values"] == [None, None] and feature["pos_str"] == [hostile, "b"]
            assert all(token == hostile for row in feature["activations"] for token in row["tokens"])


def test_an_export_that_is_broken_off_leaves_the_one_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greatctl.features.neuronpedia.BATCH", 3)
    out = tmp_path / "out"
    write_neuronpedia(folder, out, ORIGIN, {})
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_neuronpedia(folder, out, Origin("other", 1, "x", 1, 1, "y"), {}, stop)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    write_neuronpedia(folder, out, ORIGIN, {})
    assert {path.name for path in out.iterdir()} == set(before)
