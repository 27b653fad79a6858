"""Feature tables as the JSON that Neuronpedia's tools pass around, for other people's viewers and scripts.

`batch-N.json` has the layout of SAEDashboard's batches: model_id, layer, sae_set and a list of features with their logits,
histogram and activating passages, 128 latents a file. What greatctl does not measure (neuron alignment, the histogram of
all logits) is an empty list, never a made-up number. `explanations.jsonl` has one explanation a line, for latents that a
labeler named, with its scores.

    frac_nonzero                density
    freq_hist_data_bar_values   lower edges of the bins that are used (half octaves), bar_heights their tokens
    activations                 strongest passages (bin_min -1, bin_max the maximum, bin_contains -1), then passages by
                                tenth of the range; bin_contains is the share of firing tokens in that tenth as far as
                                the histogram can tell, and qualifying_token_index the token a passage is shown for
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..store.files import make_dir, write_text
from .page import marked_place
from .tables import bin_edges

__all__ = ["BATCH", "Origin", "feature_json", "write_neuronpedia"]

BATCH = 128  # latents a file
_COLUMNS = [
    "latent", "density", "max", "histogram", "top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits",
    "cofiring", "cofiring_jaccard",
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

    Args:
        labels: rows of labels.parquet by latent; fallbacks are no explanations and are left out.
        said: called with the number of latents written and their total.
    """
    make_dir(folder)
    fired = pq.read_table(tables / "latents.parquet", columns=["latent"], filters=pc.field("fired") > 0)
    latents = fired["latent"].to_pylist()
    for old in folder.glob("batch-*.json"):
        old.unlink()
    for number, start in enumerate(range(0, len(latents), BATCH)):
        features = list(_features(tables, latents[start : start + BATCH], origin))
        batch = {"model_id": origin.model, "layer": origin.layer, "sae_set": origin.sae, "features": features}
        write_text(folder / f"batch-{number}.json", json.dumps(batch, ensure_ascii=False, allow_nan=False) + "\n")
        said(min(start + BATCH, len(latents)), len(latents))
    named = [row for row in labels.values() if row["source"] == "labeler"]
    lines = [json.dumps(_explanation(row, origin), ensure_ascii=False) + "\n" for row in named]
    write_text(folder / "explanations.jsonl", "".join(lines))
    return len(latents)


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
        "frac_nonzero": facts["density"],
        "freq_hist_data_bar_values": [edge for edge, _ in used],
        "freq_hist_data_bar_heights": [count for _, count in used],
        "n_prompts_total": origin.n_prompts,
        "n_tokens_in_prompt": origin.window,
        "dataset": origin.dataset,
        "activations": [_activation(row, facts) for row in passages if row["kind"] != "near"],
    }


def _features(tables: Path, latents: Sequence[int], origin: Origin) -> Iterator[dict[str, object]]:
    chosen = pc.field("latent").isin(list(latents))
    examples: dict[int, list[dict[str, Any]]] = {}
    columns = ["latent", "kind", "decile", "activation", "pieces", "heat", "before"]
    for row in pq.read_table(tables / "examples.parquet", columns=columns, filters=chosen).to_pylist():
        examples.setdefault(row["latent"], []).append(row)
    for facts in pq.read_table(tables / "latents.parquet", columns=_COLUMNS, filters=chosen).to_pylist():
        yield feature_json(facts, examples.get(facts["latent"], []), origin)


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
        {"scorer": name, "value": row[name], "shuffled": row[f"{name}_shuffled"], "n": row[f"n_{name}"]}
        for name in ("detection", "fuzzing")
        if row[name] is not None
    ]
    words = f"{row['name']}: {row['description']}" if row["description"] else row["name"]
    return {
        "modelId": origin.model,
        "layer": f"{origin.layer}-{origin.sae}",
        "index": str(row["latent"]),
        "description": words,
        "explanationModelName": row["labeler"],
        "scores": scores,
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in values]
