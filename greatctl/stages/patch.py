"""Stage `patch`: where in the model does the difference between two prompts live?

    greatctl patch --pairs greatness --metric logit-diff --metric kl
    greatctl patch --site z
    greatctl patch --site latents --sae batchtopk-2048-k32
    greatctl patch --site edges --method attribution

One site is patched between the clean and the corrupted prompt of each pair, at every layer, unit and place,
in both directions, with one value per pair and metric. Writes results/patches/<name>: effects.parquet (a row
a cell and pair), cells.parquet (means over pairs, intervals, corrected p-values) and pairs.parquet (what was
executed, what was refused and why). With another --method than exact the effects are estimates from gradients, some
of which are then run, and every table says so (`approximate`). Every finished batch is on disk before the next begins;
a killed run goes on from there (`sweeps`, `approximate` and `edge_cells` do the work).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..errors import GreatctlError, InputError, UsageError
from ..patching.pair_files import Pair
from ..patching.sites import default_positions
from ..store.artifact import Artifact, Identity, newest, work
from .circuit_settings import CircuitSettings
from .context import Context, Plan, Result
from .made import made_already
from .models import chosen_model, slug
from .pair_sets import chosen_pairs, identity_of
from .patch_settings import directions_of, metrics_of, must_fit
from .saes import Sae, find_sae, plugins_of

if TYPE_CHECKING:
    import pyarrow as pa

    from ..model.loading import ModelInfo
    from ..patching.pairs import Refusal
    from .sweeps import Outcome, Sweeps

__all__ = ["Config", "Job", "model_of_inputs", "plan", "run"]

STAGE = "patch"
_BOOTSTRAP = 2000
_UNITS = "units"


class Config(CircuitSettings):
    """Settings of `greatctl patch`."""

    metric: list[str] = Field(
        ["logit-diff"],
        min_length=1,
        description="logit-diff, logit, prob, prob-diff, log-prob, kl, js, rank, accuracy, ce, or a plugin's (repeatable)",
    )
    pairs: str = Field(
        "greatness",
        description="bundled pairs by name, copying (made for the model), or a pair file (.toml or JSON lines)",
    )
    clean: str | None = Field(None, description="one pair instead of a file: the clean prompt")
    corrupted: str | None = Field(None, description="its counterpart, of as many tokens")
    answer: str | None = Field(None, description="the clean prompt's next token, leading space included")
    wrong_answer: str | None = Field(None, description="the corrupted prompt's next token")
    site: Literal[
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "mlp_out",
        "z",
        "q",
        "k",
        "v",
        "pattern",
        "mlp_post",
        "latents",
        "edges",
    ] = Field(
        "resid_pre",
        description="what is patched: the stream, heads (z, q, k, v, pattern), neurons (mlp_post), an SAE's latents, or edges",
    )
    sae: str | None = Field(None, description="for latents: name under results/saes, or a folder (the newest)")
    latent: list[int] = Field([], description="for latents: patch these (repeatable) instead of the most promising")
    edge: list[str] = Field([], description="for edges: these (repeatable, * stands for any part of a name)")
    top: int = Field(50, ge=1, description="how many neurons, latents or edges to list, the most promising first")
    positions: Literal["each", "spans", "all"] | None = Field(
        None,
        description="a cell for each position, each marked span, or all together (each; inside of blocks and of edges all)",
    )
    direction: Literal["both", "denoising", "noising"] = Field(
        "both", description="denoising: clean into corrupted; noising: corrupted into clean"
    )
    corruption: Literal["counterpart", "zero", "mean", "resample"] = Field(
        "counterpart", description="where noising takes its values from: the corrupted prompt, or an ablation"
    )
    layer_window: int | None = Field(
        None, ge=2, description="also patch so many neighbouring layers together, besides the single ones"
    )
    method: Literal["exact", "attribution", "attribution-qk", "attribution-drop", "eap-ig", "eap-ig-activations"] = (
        Field(
            "exact",
            description="exact: one forward pass a cell; the others estimate all cells by gradients: in one step, with exact "
            "patterns for q and k, also with one block's gradient left out at a time (sizes without a direction), or averaged "
            "over the way from one prompt (or from one layer's activations) to the other",
        )
    )
    steps: int = Field(5, ge=1, description="for eap-ig: points on the way at which gradients are taken")
    verify: int = Field(
        20, ge=0, description="for estimates: run so many of the strongest cells exactly, and as many others"
    )
    model: str | None = Field(None, description="model to patch (default: that of the newest activations or tokens)")
    batch_cells: int | None = Field(None, ge=1, description="cells a forward pass (default: what fits into memory)")
    min_gap: float = Field(
        0.01,
        ge=0,
        description="pairs whose clean and corrupted values of the first metric are closer are refused",
    )
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="folder name (PAIRS-SITE)")
    seed: int = Field(0, ge=0, description="seed of the bootstrap, of the sign flips and of resampling")


@dataclass(frozen=True)
class Job:
    """What `plan` found out and `run` needs.

    Attributes:
        sae: for latents.
    """

    source: str | Path
    info: ModelInfo
    pairs: Sequence[Pair]
    metrics: Sequence[str]
    directions: Sequence[str]
    positions: str
    plan: Plan
    sae: Sae | None = None


def plan(ctx: Context, config: Config) -> Plan:
    """What would be patched.

    Raises:
        UsageError: an unknown metric, an incomplete pair, or settings that do not go together.
        InputError: the pair file, the model or the SAE is not there, or the SAE is of another model.
        ManifestError: the pair file is malformed, or a number out of range.
        AccessError: the model is gated or not cached.
    """
    if config.circuit or config.circuit_file:
        from .circuits import plan_circuit

        return plan_circuit(ctx, config).plan
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Sweep, or say that nothing changed."""
    if config.circuit or config.circuit_file:
        from .circuits import run_circuit

        return run_circuit(ctx, config)
    job = _prepare(ctx, config)
    final, identity = job.plan.target
    if artifact := made_already(ctx, "patch", final, identity):
        return Result(STAGE, artifact.path, artifact.summary, up_to_date=True, view=_view(artifact))
    from ..patching.units import Units

    sweeps = _sweeps(ctx, config, job)
    started = time.monotonic()
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        sweeps.look_at_ends()
        if not sweeps.outcome.executed:
            raise nothing_left(job, sweeps.outcome.refused)
        effects = sweeps.run(Units(w.path / _UNITS))
        summary = _write(w.path, config, job, effects, sweeps.outcome)
        artifact = w.seal(summary, discard=(_UNITS,), seconds=round(time.monotonic() - started, 3))
    return Result(STAGE, artifact.path, artifact.summary, view=_view(artifact))


def _sweeps(ctx: Context, config: Config, job: Job) -> Sweeps:
    """Who does the work."""
    if config.site == "edges":
        from .edge_cells import Edges

        return Edges(ctx, config, job)
    if config.method != "exact":
        from .approximate import Approximate

        return Approximate(ctx, config, job)
    from .sweeps import Sweeps

    return Sweeps(ctx, config, job)


def _prepare(ctx: Context, config: Config) -> Job:
    metrics = metrics_of(ctx, config)
    directions = directions_of(config)
    sae = find_sae(ctx, config.sae) if config.site == "latents" else None
    from .. import model

    fallback = sae.model if sae and sae.model else model_of_inputs(ctx)
    source, name = chosen_model(ctx, config.model, fallback=fallback)
    label, pairs = chosen_pairs(ctx, config, source)
    info = model.describe(source, name=name, offline=ctx.offline)
    must_fit(config, info, sae)
    positions = config.positions or default_positions(config.site)
    chosen = {"site", "method", "batch_cells", "min_gap", "seed", "corruption", "layer_window"}
    chosen |= {"latent", "top"} if config.site in ("latents", "mlp_post") else set()
    chosen |= {"edge", "top"} if config.site == "edges" else set()
    chosen |= {"verify"} if config.method != "exact" else set()
    chosen |= {"steps"} if config.method.startswith("eap-ig") else set()
    settings = {
        **config.model_dump(include=chosen),
        "metric": metrics,
        "direction": list(directions),
        "positions": positions,
        "model": slug(name),
        **identity_of(label, pairs),
    }
    inputs = {}
    plugins = ctx.plugins.digests({"metrics": metrics})
    if sae:
        settings["sae"], inputs["sae"] = sae.path.name, sae.key
        plugins |= plugins_of(ctx, sae)
    identity = Identity(STAGE, settings, inputs, plugins, model_revision=info.revision)
    final = ctx.project.patches / (config.name or _default_name(label, config, positions, sae))
    facts = {
        "model": info.name,
        "pairs": len(pairs),
        "site": config.site,
        "positions": positions,
        "layers": info.n_layers,
        "directions": list(directions),
        "metrics": metrics,
        **({"sae": sae.path.name, "hook_point": sae.hook_point} if sae else {}),
    }
    plan = Plan(STAGE, final, identity, facts)
    return Job(source, info, pairs, metrics, directions, positions, plan, sae)


def _default_name(label: str, config: Config, positions: str, sae: Sae | None) -> str:
    """PAIRS-SITE, the SAE, and whatever of the rest is not the default, so that one run does not replace another."""
    more = [slug(sae.path.name)] if sae else []
    more += [positions] if positions != default_positions(config.site) else []
    more += [config.corruption] if config.corruption != "counterpart" else []
    more += [f"window{config.layer_window}"] if config.layer_window else []
    more += [config.method] if config.method != "exact" else []
    return "-".join([label, config.site, *more])


def model_of_inputs(ctx: Context) -> str | None:
    """The model of the newest activations, or of the newest tokens where those were made since."""
    tokens = newest(ctx.project.tokens, "tokenize")
    activations = newest(ctx.project.activations, "harvest")
    if activations and (tokens is None or activations.record["inputs"]["tokens"] == tokens.fingerprint):  # type: ignore[index]
        return json.loads((activations.check().path / "meta.json").read_bytes())["model"]
    if tokens:
        return json.loads((tokens.check().path / "tokenizer.json").read_bytes())["path_or_id"]
    return None


def _write(folder: Path, config: Config, job: Job, effects: pa.Table, outcome: Outcome) -> dict[str, object]:
    """Write the three tables; returns the summary."""
    from ..patching.pairs import clusters_of
    from ..patching.summary import summary
    from ..patching.tables import cell_table, pair_table
    from ..store.tables import write_table

    executed = [pair.pair for pair in outcome.executed]
    labels = clusters_of(executed)
    clusters = {pair.id: label for pair, label in zip(executed, labels, strict=True)}
    cells = cell_table(effects, draws=_BOOTSTRAP, seed=config.seed, clusters=clusters)
    pairs = pair_table(job.pairs, outcome.executed, outcome.refused, outcome.words)
    for name, table in (("effects", effects), ("cells", cells), ("pairs", pairs)):
        write_table(folder / f"{name}.parquet", table)
    ends = {name: list(values.values()) for name, values in outcome.ends.items()}
    found = summary(cells, ends, n_refused=len(outcome.refused), n_units=len(set(labels)))
    more: dict[str, object] = {"positions": job.positions, "corruption": config.corruption, "chosen": outcome.chosen}
    if config.method != "exact":
        from .approximate import calibration, combined

        found["calibration"] = calibration(cells, config.verify)
        more["verified"] = combined(found["calibration"], config.method)  # type: ignore[arg-type]
    if job.sae:
        more |= {"sae": job.sae.path.name, "hook_point": job.sae.hook_point}
    return {**found, "model": job.info.name, **{key: value for key, value in more.items() if value}}


def _view(artifact: Artifact) -> dict[str, object]:
    """Panels for the terminal's pictures, and the refused pairs."""
    import pyarrow.parquet as pq

    from ..patching.summary import panels
    from ..store.tables import read_rows

    rows = read_rows(artifact.path / "pairs.parquet", ["id", "status", "reason", "tokens"])
    tokens = [row["tokens"] for row in rows if row["status"] == "executed"]
    return {
        "panels": panels(pq.read_table(artifact.path / "cells.parquet"), tokens),
        "refused": [(row["id"], row["reason"]) for row in rows if row["status"] == "refused"],
    }


def nothing_left(job: Job, refused: Sequence[Refusal]) -> GreatctlError:
    """The error where no pair is left to patch."""
    reasons = "; ".join(f"{r.pair.id}: {r.reason}" for r in refused[:5])
    kind = UsageError if len(job.pairs) == 1 and job.pairs[0].id == "given" else InputError
    return kind(
        f"none of the {len(job.pairs)} pairs can be patched with {job.info.name}",
        why=reasons,
        fix="name a file with --pairs whose prompts correspond place by place and tell the answers apart",
        code="no-usable-pair",
    )
