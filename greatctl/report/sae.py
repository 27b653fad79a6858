"""The section on the autoencoder: its numbers on texts that it has not seen, its controls, its training, its densities.

Whatever a control would have said is named as missing where it was not trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..store.artifact import Artifact
from ..store.tables import read_columns
from .charts import bars, lines, points
from .view import Block, Cell, Finding, Origin, Prose, Table, read_from

__all__ = ["finding", "section"]

_MISSING = "the same architecture with a frozen random decoder, one on a model with random weights, and two other seeds"
_SPLITS = {
    "heldout-work": "other works of authors that were read",
    "heldout-author": "authors of whom nothing was read",
}
_COSTS = ("clean", "spliced", "zero", "mean")


def finding(trained: Artifact, saes: Sequence[Artifact]) -> Finding:
    """The autoencoder in one sentence with numbers; a better one that was not interpreted is named."""
    summary = trained.summary
    parts = [f"The {summary['arch']} autoencoder of {summary['d_sae']:,} latents ({trained.path.name})"]
    if summary.get("explained_variance") is not None:
        parts.append(
            f"explains {summary['explained_variance']:.1%} of the variance of held-out activations with "
            f"{summary['l0']:.1f} latents active a token"
        )
    if summary.get("ce_loss_recovered") is not None:
        parts.append(
            f"and, put in its place, recovers {summary['ce_loss_recovered']:.1%} of the loss that zeroing the layer would cost"
        )
    text = " ".join(parts) + f"; {summary['dead_fraction']:.1%} of the latents are dead.{_better(trained, saes)}"
    return Finding(text, "autoencoder", Origin(trained.fingerprint, "evaluation.json"))


def _better(trained: Artifact, saes: Sequence[Artifact]) -> str:
    """Which autoencoder of the same site beats this one in both loss and sparsity, if one does."""
    mine, site = trained.summary, trained.config.get("hook_point")
    if mine.get("ce_loss_recovered") is None or mine.get("l0") is None:
        return ""
    rivals = [
        other
        for other in saes
        if other.config.get("hook_point") == site
        and (other.summary.get("ce_loss_recovered") or 0.0) > mine["ce_loss_recovered"]
        and (other.summary.get("l0") or float("inf")) <= mine["l0"]
    ]
    if not rivals:
        return ""
    best = max(rivals, key=lambda other: other.summary["ce_loss_recovered"])
    return (
        f" Another one, {best.path.name}, recovers more ({best.summary['ce_loss_recovered']:.1%}) with no more latents "
        "a token, but these pages are not about it."
    )


def section(trained: Artifact, controls: Artifact | None, saes: Sequence[Artifact]) -> list[Block]:
    """Quality in all and by group, the loss of the spliced model, controls, the other autoencoders, curve, densities."""
    measured = json.loads((trained.path / "evaluation.json").read_bytes())
    training = json.loads((trained.path / "training.json").read_bytes())
    curve = read_columns(trained.path / "metrics.parquet")
    head = [Prose(f"These pages are about {trained.path.name}."), *_losses(measured), *_reasons(measured)]
    quality = Table(
        ["quantity", "value"], _quality(measured, training), caption="On held-out windows", digits=4, folded=True
    )
    last: list[Block] = (
        [_density(histogram, measured.get("silent_fraction"))]
        if (histogram := measured.get("density_histogram"))
        else []
    )
    return [
        *read_from(trained, "evaluation.json", head),
        *_controls(controls),
        *_others(trained, saes),
        *read_from(trained, "metrics.parquet", [_training(curve)]),
        *read_from(trained, "evaluation.json", [*last, quality, *_groups(measured), *_neighbours(measured)]),
    ]


def _others(trained: Artifact, saes: Sequence[Artifact]) -> list[Block]:
    """Every autoencoder of the project side by side, and what each pays in latents for what it explains."""
    if len(saes) < 2:
        return []
    keys = ("arch", "d_sae", "l0", "explained_variance", "ce_loss_recovered", "dead_fraction")
    rows: list[list[Cell]] = []
    series: dict[str, tuple[list, list, list]] = {}
    for other in sorted(saes, key=lambda a: a.path.name):
        summary, site = other.summary, str(other.config.get("hook_point") or "")
        shown = other.fingerprint == trained.fingerprint
        rows.append([other.path.name, site, *(summary.get(key) for key in keys), shown, other.fingerprint])
        if summary.get("l0") is not None and summary.get("explained_variance") is not None:
            x, y, names = series.setdefault(site, ([], [], []))
            x.append(summary["l0"])
            y.append(summary["explained_variance"])
            names.append(other.path.name)
    headers = ["autoencoder", "site", "architecture", "d_sae", "L0", "explained variance", "ce recovered", "dead",
               "shown here", "fingerprint"]  # fmt: skip
    table = Table(headers, rows, numeric=list(range(3, 8)), caption="Every autoencoder of this project", digits=4)
    words = "What each explains, over the latents that it uses a token: up and to the left is better."
    chart = points(
        "Explained variance over L0", series, x_title="L0", y_title="explained variance", words=words, equal=False
    )
    return [table, *([chart] if sum(len(x) for x, _, _ in series.values()) > 2 else [])]


def _quality(measured: Mapping[str, Any], training: Mapping[str, Any]) -> list[Sequence]:
    rows: list[Sequence] = [
        [k.replace("_", " "), v] for k, v in measured.items() if isinstance(v, int | float | str) or v is None
    ]
    spread = measured.get("l0_percentiles") or {}
    rows += [[f"l0, percentile {percentile}", value] for percentile, value in spread.items()]
    for key in ("hook_point", "target_hook_point", "model", "epochs", "tokens"):
        if key in training:
            rows.append([key.replace("_", " "), training[key]])
    rows += [[f"rows {k.replace('_', ' ')}", v] for k, v in training.get("rows", {}).items()]
    return rows


def _reasons(measured: Mapping[str, Any]) -> list[Block]:
    """Why a number is not there."""
    reasons = {**(measured.get("undefined") or {}), **(measured.get("ce_undefined") or {})}
    words = "; ".join(f"{key.replace('_', ' ')}: {why}" for key, why in reasons.items())
    return [Prose(f"Not available: {words}.", quiet=True)] if words else []


def _groups(measured: Mapping[str, Any]) -> list[Block]:
    """A table for each grouping: held out by work and by author, then each character, author and work."""
    blocks: list[Block] = []
    for key, rows in measured.items():
        if not key.startswith("per_") or not rows:
            continue
        name = key.removeprefix("per_")
        losses = {row["label"]: row for row in measured.get(f"ce_per_{name}") or ()}
        found = [_group_row(row, losses.get(row["label"], {})) for row in rows]
        headers = [name, "rows", "explained variance", "nmse", "l0", "l0 5 %", "l0 95 %", "ce recovered", "kl"]
        caption = f"Held-out windows by {name}" + (": " + _kinds(rows) if name == "split" else "")
        blocks.append(Table(headers, found, numeric=list(range(1, 9)), caption=caption, digits=4, folded=True))
    return blocks


def _group_row(row: Mapping[str, Any], loss: Mapping[str, Any]) -> list[Cell]:
    numbers = [row[key] for key in ("rows", "explained_variance", "nmse", "l0", "l0_p5", "l0_p95")]
    return [row["label"], *numbers, loss.get("ce_loss_recovered"), loss.get("kl")]


def _kinds(rows: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{row['label']} = {_SPLITS.get(row['label'], 'no other split')}" for row in rows)


def _losses(measured: Mapping[str, Any]) -> list[Block]:
    """What the model loses with the autoencoder, zeros or the mean in the place of the activation."""
    if measured.get("ce_clean") is None:
        return []
    rows: list[list[Cell]] = []
    for name in _COSTS:
        recovered = {"zero": "ce_loss_recovered", "mean": "ce_loss_recovered_mean"}.get(name)
        kl = {"spliced": "kl", "zero": "kl_zero", "mean": "kl_mean"}.get(name)
        rows.append(
            [
                name,
                measured.get(f"ce_{name}"),
                measured.get(kl) if kl else "",
                measured.get(recovered) if recovered else "",
            ]
        )
    headers = ["in the place of the activation", "cross-entropy, nats", "KL to clean, nats", "recovered against it"]
    return [Table(headers, rows, numeric=[1, 2, 3], caption="The language model's loss on held-out windows", digits=4)]


def _controls(controls: Artifact | None) -> list[Block]:
    if controls is None:
        words = f"Controls not trained for this run: {_MISSING}. Until they are, a good number here is weak evidence."
        return [Prose(words, quiet=True)]
    keys = {
        "explained_variance": "explained variance",
        "l0": "l0",
        "ce_loss_recovered": "ce recovered",
        "dead_fraction": "dead",
        "matched_ours_mean_max_cosine": "its rows found here",
        "matched_theirs_mean_max_cosine": "these rows found in it",
        "matched_hungarian_mean_cosine": "one to one",
        "matched_ours_matched_0.7": "matched at 0.7",
    }
    compared = json.loads((controls.path / "comparison.json").read_bytes())
    rows = [[row["control"], *(row.get(key) for key in keys)] for row in compared]
    words = (
        "Matching compares decoder rows by cosine: the mean over rows of the best partner in either direction, and the mean "
        "over one-to-one pairs. A frozen decoder shows what chance gives; two seeds show how much returns."
    )
    caption = "The autoencoder beside its controls, same settings and texts"
    table = Table(["", *keys.values()], rows, numeric=list(range(1, 9)), caption=caption, digits=4)
    return read_from(controls, "comparison.json", [table, Prose(words, quiet=True)])


def _training(curve: Mapping[str, list]) -> Block:
    steps = curve["step"]
    wanted = {"explained_variance": "explained variance", "dead_fraction": "dead fraction", "l0": "L0*"}
    series = {label: curve[name] for name, label in wanted.items() if name in curve}
    last = {label.rstrip("*"): values[-1] for label, values in series.items() if values and values[-1] is not None}
    words = f"{steps[-1]:,} steps; at the end " + ", ".join(f"{k} {v:.3g}" for k, v in last.items()) + "."
    return lines("Training", steps, series, x_title="step", words=words)


def _density(histogram: Mapping[str, list], silent: float | None) -> Block:
    counts = histogram["latents"]
    rest = f" {silent:.1%} of all latents fire on none of these tokens and have no bar." if silent else ""
    return bars(
        "How often latents fire",
        histogram["log10_density"][: len(counts)],
        counts,
        x_title="log10 of the share of held-out tokens (lower edge)",
        y_title="latents",
        words=f"{sum(counts):,} latents by the share of held-out tokens on which they fire.{rest}",
    )


def _neighbours(measured: Mapping[str, Any]) -> list[Block]:
    found = measured.get("decoder_neighbours")
    if not found:
        return []
    spread = found["max_cosine_percentiles"]
    words = (
        f"Nearest decoder neighbours of {found['compared']:,} latents: the largest cosine to another latent is "
        f"{spread['50']:.2f} for the median latent and {spread['95']:.2f} at the 95th percentile; "
        f"{found['above_0.9']:.1%} of the latents have a neighbour above 0.9."
    )
    pairs = [[pair["latent"], pair["neighbour"], pair["cosine"]] for pair in found["closest"]]
    return [
        Prose(words),
        Table(["latent", "neighbour", "cosine"], pairs, numeric=[0, 1, 2], caption="Closest pairs", folded=True),
    ]
