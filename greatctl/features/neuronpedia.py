"""Feature tables as the JSON that Neuronpedia's tools pass around, for other people's viewers and scripts.

`batch-N.json` has the layout of SAEDashboard's batches, which Neuronpedia's converter reads: model_id, layer, sae_set,
sae_id_suffix and a list of features with their logits, histogram and activating passages, 128 latents a file. What
greatctl does not measure (neuron alignment, the histogram of all logits) is an empty list, never a made-up number, and a
number that is not finite is null. `explanations.jsonl` has one explanation a line, for latents that a labeler named, under
the field names of Neuronpedia's own, with its scores.

    frac_nonzero                density
    freq_hist_data_bar_values   lower edges of the bins that are used (half octaves), bar_heights their tokens
    activations                 strongest passages (bin_min -1, bin_max the maximum, bin_contains -1), then passages by
                                tenth of the range; bin_contains is the share of firing tokens in that tenth as far as
                                the histogram can tell, and qualifying_token_index the token a passage is shown for
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..store.files import make_dir, write_text
from .page import marked_place
from .tables import bin_edges

__all__ = ["BATCH", "Origin", "feature_json", "write_neuronpedia"]

BATCH = 128  # latents a file
_PIECE = 4096  # rows of a table held at once
_EXAMPLES = ["latent", "kind", "decile", "activation", "pieces", "heat", "before"]
_COLUMNS = [
    "latent", "fired", "density", "max", "histogram", "top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits",
]  # fmt: skip
_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "decoder_weights_dist",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What the features are of. `n_prompts` windows of `window` tokens were read, from `dataset`."""

    model: str
    layer: int
    sae: str
    n_prompts: int
    window: int
    dataset: str


def write_neuronpedia(
    tables: Path,
    folder: Path,
    origin: Origin,
    labels: Mapping[int, Mapping[str, Any]],
    said: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Write every latent that fires, from the feature tables in `tables`; returns how many.

    The files appear together at the end: an export that was broken off leaves those of the one before.

    Args:
        labels: rows of labels.parquet by latent; fallbacks are no explanations and are left out.
        said: called with the number of latents written and their total.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    make_dir(partial)
    total = pq.read_table(tables / "latents.parquet", columns=["latent"], filters=pc.field("fired") > 0).num_rows
    features = _features(tables, origin)
    for number, start in enumerate(range(0, total, BATCH)):
        batch = {"model_id": origin.model, "layer": origin.layer, "sae_set": origin.sae, "sae_id_suffix": None}
        write_text(partial / f"batch-{number}.json", _line({**batch, "features": list(islice(features, BATCH))}))
        said(min(start + BATCH, total), total)
    named = [row for row in labels.values() if row["source"] == "labeler"]
    write_text(partial / "explanations.jsonl", "".join(_line(_explanation(row, origin)) for row in named))
    for old in folder.glob("batch-*.json"):
        old.unlink()
    for new in partial.iterdir():
        new.replace(folder / new.name)
    partial.rmdir()
    return total


def feature_json(facts: Mapping[str, Any], passages: Sequence[Mapping[str, Any]], origin: Origin) -> dict[str, object]:
    """One feature of a batch, from its rows of latents.parquet and examples.parquet."""
    used = [(edge, count) for edge, count in zip(bin_edges(), facts["histogram"], strict=True) if count]
    return {
        "feature_index": facts["latent"],
        **{name: [] for name in _EMPTY},
        "neg_str": facts["bottom_logit_tokens"],
        "neg_values": _rounded(facts["bottom_logits"]),
        "pos_str": facts["top_logit_tokens"],
        "pos_values": _rounded(facts["top_logits"]),
        "frac_nonzero": _finite(facts["density"]),
        "freq_hist_data_bar_values": [edge for edge, _ in used],
        "freq_hist_data_bar_heights": [count for _, count in used],
        "n_prompts_total": origin.n_prompts,
        "n_tokens_in_prompt": origin.window,
        "dataset": origin.dataset,
        "activations": [_activation(row, facts) for row in passages if row["kind"] != "near"],
    }


def _features(tables: Path, origin: Origin) -> Iterator[dict[str, object]]:
    """Every latent that fires with its passages; both tables lie in the order of latents and are read once, in pieces."""
    by_latent = groupby(_rows(tables / "examples.parquet", _EXAMPLES), key=itemgetter("latent"))
    at, passages = next(by_latent, (-1, iter(())))
    for facts in _rows(tables / "latents.parquet", _COLUMNS):
        while 0 <= at < facts["latent"]:
            at, passages = next(by_latent, (-1, iter(())))
        if facts["fired"] > 0:
            yield feature_json(facts, list(passages) if at == facts["latent"] else [], origin)


def _rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for piece in file.iter_batches(_PIECE, columns=columns):
            yield from piece.to_pylist()


def _activation(row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, object]:
    low, high, share = -1.0, float(facts["max"]), -1.0
    if row["kind"] == "decile":
        low, high = (facts["max"] * (row["decile"] - end) / 10 for end in (1, 0))
        share = _share(facts["histogram"], low, high)
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": row["pieces"],
        "values": _rounded(row["heat"]),
        "qualifying_token_index": marked_place(row),
    }


def _share(histogram: Sequence[int], low: float, high: float) -> float:
    """The share of firing tokens between two activations, tokens counted evenly inside a bin of the histogram."""
    edges = bin_edges()
    ends = [*edges[1:], edges[-1] * 2**0.5]
    inside = sum(
        count * max(0.0, min(high, end) - max(low, edge)) / (end - edge)
        for edge, end, count in zip(edges, ends, histogram, strict=True)
    )
    return round(min(1.0, inside / max(sum(histogram), 1)), 4)


def _explanation(row: Mapping[str, Any], origin: Origin) -> dict[str, object]:
    """One line of explanations.jsonl."""
    scores = [
        {
            "explanationScoreTypeName": f"greatctl_{name}",
            "explanationScoreModelName": row["labeler"],
            "value": row[name],
            "low": row.get(f"{name}_low"),
            "high": row.get(f"{name}_high"),
            "shuffled": row[f"{name}_shuffled"],
            "n": row[f"n_{name}"],
        }
        for name in ("detection", "fuzzing")
        if row[name] is not None
    ]
    words = f"{row['name']}: {row['description']}" if row["description"] else row["name"]
    return {
        "modelId": origin.model,
        "layer": f"{origin.layer}-{origin.sae}",
        "index": str(row["latent"]),
        "description": words,
        "typeName": "greatctl_passages",
        "explanationModelName": row["labeler"],
        "scores": scores,
    }


def _line(value: Mapping[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [_finite(round(value, 3)) for value in map(float, values)]
