"""Stage `patch`: where in the model does the difference between two prompts live?

    greatctl patch --pairs greatness --metric logit-diff --metric kl

Every layer and position of a residual site is patched between the clean and the corrupted prompt of each
pair, in both directions, with one value per pair and metric. Writes results/patches/<name>: effects.parquet
(a row a cell and pair), cells.parquet (means over pairs, intervals, family-wise p-values) and pairs.parquet
(what was executed, what was refused and why). One finished layer of one group of pairs is on disk before
the next begins; a killed run goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from .. import patching
from ..errors import GreatctlError, InputError, UsageError
from ..patching.pairs import EncodedPair, Pair, Refusal, encode_pairs, read_pairs
from ..store.artifact import Artifact, Identity, current, newest, touch, work
from ..store.files import canonical_json, sha256_bytes
from .context import Context, Plan, Result, StageConfig
from .models import chosen_model, open_model, slug

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ..extend.contracts import PatchMetric
    from ..model.loading import ModelInfo
    from ..patching.runs import Group
    from ..patching.units import Units

__all__ = ["Config", "plan", "run"]

STAGE = "patch"
_BOOTSTRAP = 2000
_UNITS = "units"
_ONE = ("clean", "corrupted", "answer", "wrong_answer")


class Config(StageConfig):
    """Settings of `greatctl patch`."""

    metric: list[str] = Field(
        ["logit-diff"],
        min_length=1,
        description="logit-diff, prob, prob-diff, kl, or a plugin's (repeatable)",
    )
    pairs: str = Field("greatness", description="bundled pairs by name, or a pair file (.toml or JSON lines)")
    clean: str | None = Field(None, description="one pair instead of a file: the clean prompt")
    corrupted: str | None = Field(None, description="its counterpart, of as many tokens")
    answer: str | None = Field(None, description="the clean prompt's next token, leading space included")
    wrong_answer: str | None = Field(None, description="the corrupted prompt's next token")
    site: Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"] = Field(
        "resid_pre", description="activation that is patched, in every layer"
    )
    direction: Literal["both", "denoising", "noising"] = Field(
        "both", description="denoising: clean into corrupted; noising: corrupted into clean"
    )
    method: Literal["exact"] = Field("exact", description="exact: one forward pass a cell")
    model: str | None = Field(None, description="model to patch (default: that of the newest activations or tokens)")
    batch_cells: int = Field(64, ge=1, description="cells a forward pass; bounds the memory")
    min_gap: float = Field(
        0.01,
        ge=0,
        description="pairs whose clean and corrupted values of the first metric are closer are refused",
    )
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="folder name (PAIRS-SITE)")
    seed: int = Field(0, ge=0, description="seed of the bootstrap and of the sign flips")


@dataclass(frozen=True)
class _Job:
    """What `plan` found out and `run` needs."""

    source: str | Path
    info: ModelInfo
    pairs: Sequence[Pair]
    metrics: Sequence[str]
    directions: Sequence[str]
    plan: Plan


@dataclass
class _Outcome:
    """What the sweep leaves besides its units.

    Attributes:
        refused, executed: the pairs that were not, and that were swept.
        ends: metric -> pair id -> (clean, corrupted) value.
        words: pair id -> token strings of the (clean, corrupted) prompt.
    """

    refused: list[Refusal]
    executed: list[EncodedPair] = field(default_factory=list)
    ends: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    words: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)

    def table(self, group: Group, layer: int, direction: str, patched: Mapping[str, Tensor]) -> pa.Table:
        """The rows of one unit."""
        import numpy as np

        from ..patching.tables import effect_table

        ids = [pair.pair.id for pair in group.pairs]
        values = {}
        for name, cells in patched.items():
            clean, corrupted = np.array([self.ends[name][id] for id in ids]).T
            values[name] = (clean, corrupted, cells.numpy())
        return effect_table(ids, [self.words[id][0] for id in ids], group.site, layer, direction, values)


def plan(ctx: Context, config: Config) -> Plan:
    """What would be patched.

    Raises:
        UsageError: an unknown metric or an incomplete pair.
        InputError: the pair file or the model is not there.
        ManifestError: the pair file is malformed.
        AccessError: the model is gated or not cached.
    """
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Sweep, or say that nothing changed."""
    job = _prepare(ctx, config)
    final, identity = job.plan.final, job.plan.identity
    assert final is not None and identity is not None
    artifact, reason = current(final, identity)
    if artifact and not ctx.force:
        touch(artifact)
        ctx.run.notice("patch: up to date")
        return Result(STAGE, artifact.path, artifact.summary, up_to_date=True, view=_view(artifact))
    ctx.run.notice(f"patch: {reason or 'forced'}")
    from ..patching.units import Units

    encoded, refused = _encode(ctx, job)
    started = time.monotonic()
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        outcome = _Outcome(refused)
        units = Units(w.path / _UNITS)
        _sweep(ctx, config, job, units, encoded, outcome)
        if not outcome.executed:
            raise _nothing_left(job, outcome.refused)
        summary = _write(w.path, config, job, units.merged(), outcome)
        artifact = w.seal(summary, discard=(_UNITS,), seconds=round(time.monotonic() - started, 3))
    return Result(STAGE, artifact.path, artifact.summary, view=_view(artifact))


def _prepare(ctx: Context, config: Config) -> _Job:
    metrics = list(dict.fromkeys(config.metric))
    known = ctx.plugins.registry.names("metrics")
    for name in metrics:
        if name not in known:
            ctx.plugins.registry.get("metrics", name)  # raises, with the nearest names or the failed plugin
    label, pairs = _pairs(ctx, config)
    from .. import model

    source, name = chosen_model(ctx, config.model, fallback=_model_of_inputs(ctx))
    info = model.describe(source, name=name, offline=ctx.offline)
    directions = patching.DIRECTIONS if config.direction == "both" else (config.direction,)
    shape = config.model_dump(include={"site", "method", "batch_cells", "min_gap", "seed"})
    settings = {
        **shape,
        "metric": metrics,
        "direction": list(directions),
        "model": slug(name),
        "pairs": label,
        "pairs_sha256": sha256_bytes(canonical_json([asdict(pair) for pair in pairs]).encode()),
    }
    plugins = ctx.plugins.digests({"metrics": metrics})
    identity = Identity(STAGE, settings, plugins=plugins, model_revision=info.revision)
    final = ctx.project.patches / (config.name or f"{label}-{config.site}")
    facts = {
        "model": info.name,
        "pairs": len(pairs),
        "site": config.site,
        "layers": info.n_layers,
        "directions": list(directions),
        "metrics": metrics,
    }
    return _Job(source, info, pairs, metrics, directions, Plan(STAGE, final, identity, facts))


def _pairs(ctx: Context, config: Config) -> tuple[str, list[Pair]]:
    """The pairs and a short word for them: the bundled name, the file's stem, or `given`."""
    given = {name: getattr(config, name) for name in _ONE}
    if any(value is not None for value in given.values()):
        missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if not value]
        if missing:
            raise UsageError(
                "a pair on the command line needs all of its four parts",
                why=f"{', '.join(missing)} missing",
                fix="give --clean, --corrupted, --answer and --wrong-answer, or a file with --pairs",
            )
        return "given", [Pair(id="given", **given)]
    path = Path(config.pairs).expanduser()
    if path.suffix or len(path.parts) > 1:
        return slug(path.stem), read_pairs(path)
    from .. import reference

    return config.pairs, read_pairs(Path(reference.pairs_path(config.pairs)))


def _model_of_inputs(ctx: Context) -> str | None:
    """The model of the newest activations, or of the newest tokens where those were made since."""
    tokens = newest(ctx.project.tokens, "tokenize")
    activations = newest(ctx.project.activations, "harvest")
    if activations and (tokens is None or activations.record["inputs"]["tokens"] == tokens.fingerprint):  # type: ignore[index]
        return json.loads((activations.check().path / "meta.json").read_bytes())["model"]
    if tokens:
        return json.loads((tokens.check().path / "tokenizer.json").read_bytes())["path_or_id"]
    return None


def _encode(ctx: Context, job: _Job) -> tuple[list[EncodedPair], list[Refusal]]:
    from ..model.tokenizer import encode, load_tokenizer

    tokenizer = load_tokenizer(job.source, offline=ctx.offline)
    encoded, refused = encode_pairs(job.pairs, lambda text: encode(tokenizer, text), n_ctx=job.info.n_ctx)
    for refusal in refused:
        ctx.run.notice(f"patch: pair {refusal.pair.id!r} refused: {refusal.reason}")
    if not encoded:
        raise _nothing_left(job, refused)
    return encoded, refused


def _sweep(
    ctx: Context, config: Config, job: _Job, units: Units, encoded: Sequence[EncodedPair], outcome: _Outcome
) -> None:
    """Sweep what `units` does not have yet, one group of pairs, direction and layer at a time."""
    from ..patching.runs import prepare
    from ..patching.sweep import sweep_layer
    from ..patching.units import groups

    frozen = open_model(ctx, job.info.name)
    metrics: dict[str, PatchMetric] = {name: ctx.plugins.registry.get("metrics", name)() for name in job.metrics}
    parts = groups(encoded)
    steps = [(direction, layer) for direction in job.directions for layer in range(frozen.n_layers)]
    already, done = len(units), 0
    for number, members in enumerate(parts):
        group = _with_gap(ctx, config, prepare(frozen, members, config.site), metrics, outcome)
        for pair in group.pairs:
            clean, corrupted = (
                [frozen.tokenizer.decode([i]) for i in row] for row in (pair.clean_ids, pair.corrupted_ids)
            )
            outcome.words[pair.pair.id] = clean, corrupted
        for direction, layer in steps:
            if group.pairs and (number, direction, layer) not in units:
                patched = sweep_layer(frozen, group, layer, direction, metrics, config.batch_cells)
                units.write((number, direction, layer), outcome.table(group, layer, direction, patched))
            done += 1
            ctx.run.progress("patch", done, len(parts) * len(steps), "layers", already=already)
            ctx.run.stop_here()


def _with_gap(
    ctx: Context, config: Config, group: Group, metrics: Mapping[str, PatchMetric], outcome: _Outcome
) -> Group:
    """The pairs whose two runs differ in the first metric; the others are refused with the number."""
    from ..patching.metrics import measure

    ends = {
        name: [measure(name, metric, logits, group.answers).tolist() for logits in group.logits]
        for name, metric in metrics.items()
    }
    first = next(iter(metrics))
    rows = []
    for row, pair in enumerate(group.pairs):
        gap = ends[first][0][row] - ends[first][1][row]
        if abs(gap) < config.min_gap or gap == 0:
            reason = f"the runs differ by {gap:.3g} in {first}; --min-gap asks for {config.min_gap:g}"
            ctx.run.notice(f"patch: pair {pair.pair.id!r} refused: {reason}")
            outcome.refused.append(Refusal(pair.pair, reason))
            continue
        rows.append(row)
        outcome.executed.append(pair)
        for name, (clean, corrupted) in ends.items():
            outcome.ends.setdefault(name, {})[pair.pair.id] = (clean[row], corrupted[row])
    return group.select(rows)


def _write(folder: Path, config: Config, job: _Job, effects: pa.Table, outcome: _Outcome) -> dict[str, object]:
    """Write the three tables; returns the summary."""
    from ..patching.summary import summary
    from ..patching.tables import cell_table, pair_table
    from ..store.tables import write_table

    cells = cell_table(effects, draws=_BOOTSTRAP, seed=config.seed)
    pairs = pair_table(job.pairs, outcome.executed, outcome.refused, outcome.words)
    for name, table in (("effects", effects), ("cells", cells), ("pairs", pairs)):
        write_table(folder / f"{name}.parquet", table)
    ends = {name: list(values.values()) for name, values in outcome.ends.items()}
    return {**summary(cells, ends, n_refused=len(outcome.refused)), "model": job.info.name}


def _view(artifact: Artifact) -> dict[str, object]:
    """Panels for the terminal's heat maps, and the refused pairs."""
    import pyarrow.parquet as pq

    from ..patching.summary import panels
    from ..store.tables import read_rows

    rows = read_rows(artifact.path / "pairs.parquet", ["id", "status", "reason", "tokens"])
    tokens = [row["tokens"] for row in rows if row["status"] == "executed"]
    return {
        "panels": panels(pq.read_table(artifact.path / "cells.parquet"), tokens),
        "refused": [(row["id"], row["reason"]) for row in rows if row["status"] == "refused"],
    }


def _nothing_left(job: _Job, refused: Sequence[Refusal]) -> GreatctlError:
    reasons = "; ".join(f"{r.pair.id}: {r.reason}" for r in refused[:5])
    kind = UsageError if len(job.pairs) == 1 and job.pairs[0].id == "given" else InputError
    return kind(
        f"none of the {len(job.pairs)} pairs can be patched with {job.info.name}",
        why=reasons,
        fix="name a file with --pairs whose prompts are equally long and whose answers are one token here",
        code="no-usable-pair",
    )
