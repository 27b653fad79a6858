"""The section on the autoencoder: its numbers on texts that it has not seen, its training, its densities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..store.artifact import Artifact
from ..store.tables import read_columns
from .charts import bars, lines
from .view import Block, Prose, Table

__all__ = ["finding", "section"]

_MISSING = "the same architecture with a frozen random decoder, one on a model with random weights, and two other seeds"


def finding(summary: Mapping[str, Any]) -> str:
    """The autoencoder in one sentence with numbers."""
    parts = [f"The {summary['arch']} autoencoder of {summary['d_sae']:,} latents"]
    if summary.get("explained_variance") is not None:
        parts.append(
            f"explains {summary['explained_variance']:.1%} of the variance of held-out activations with "
            f"{summary['l0']:.1f} latents active a token"
        )
    if summary.get("ce_loss_recovered") is not None:
        parts.append(
            f"and, put in its place, recovers {summary['ce_loss_recovered']:.1%} of the loss that zeroing the layer would cost"
        )
    return " ".join(parts) + f"; {summary['dead_fraction']:.1%} of the latents are dead."


def section(trained: Artifact, activations: Artifact | None) -> list[Block]:
    """Quality, training curve, density histogram, and the controls that are missing."""
    measured = json.loads((trained.path / "evaluation.json").read_bytes())
    training = json.loads((trained.path / "training.json").read_bytes())
    curve = read_columns(trained.path / "metrics.parquet")
    blocks: list[Block] = [
        Table(["quantity", "value"], _quality(measured, training), caption="On held-out windows"),
        _training(curve),
    ]
    histogram = measured.get("density_histogram")
    if histogram:
        blocks.append(_density(histogram))
    blocks.append(
        Prose(
            f"Controls not trained for this run: {_MISSING}. Until they are, a good number here is weak evidence.",
            quiet=True,
        )
    )
    return blocks


def _quality(measured: Mapping[str, Any], training: Mapping[str, Any]) -> list[Sequence]:
    rows: list[Sequence] = [
        [k.replace("_", " "), v] for k, v in measured.items() if isinstance(v, int | float | str) or v is None
    ]
    for key in ("hook_point", "model", "epochs", "tokens"):
        rows.append([key.replace("_", " "), training.get(key)])
    rows += [[f"rows {k.replace('_', ' ')}", v] for k, v in training.get("rows", {}).items()]
    return rows


def _training(curve: Mapping[str, list]) -> Block:
    steps = curve["step"]
    wanted = {"explained_variance": "explained variance", "dead_fraction": "dead fraction", "l0": "L0*"}
    series = {label: curve[name] for name, label in wanted.items() if name in curve}
    last = {label.rstrip("*"): values[-1] for label, values in series.items() if values and values[-1] is not None}
    words = f"{steps[-1]:,} steps; at the end " + ", ".join(f"{k} {v:.3g}" for k, v in last.items()) + "."
    return lines("Training", steps, series, x_title="step", words=words)


def _density(histogram: Mapping[str, list]) -> Block:
    counts = histogram["latents"]
    return bars(
        "How often latents fire",
        histogram["log10_density"][: len(counts)],
        counts,
        x_title="log10 of the share of held-out tokens (lower edge)",
        y_title="latents",
        words=f"{sum(counts):,} latents by the share of held-out tokens on which they fire.",
    )
