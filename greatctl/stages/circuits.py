"""`patch --circuit`: a small set of nodes, edges or latents that carries the effect, and what speaks for it.

    greatctl patch --circuit --pairs copying
    greatctl patch --circuit --circuit-kind latents --pairs greatness
    greatctl patch --circuit-file results/patches/copying-circuit-edges/circuit.json --pairs copying

Pairs that are not held out choose the circuit, the others judge it. Writes results/patches/<PAIRS>-circuit-<KIND>:
circuit.json (to be read, edited and tested again), components.parquet (the score of every component),
faithfulness.parquet, random_sets.parquet, minimality.parquet and pairs.parquet. The set is measured under two
ablations, the counterpart prompt and the mean (or zeros), since what is faithful under one need not be under the other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UsageError
from ..patching.circuits import Circuit, read_circuit
from ..patching.pair_files import Pair
from ..store.artifact import Artifact, Identity, sealed_under, work
from .context import Context, Plan, Result
from .made import made_already
from .models import chosen_model, slug
from .pair_sets import chosen_pairs, identity_of
from .patch_settings import metrics_of, must_fit
from .saes import Sae, find_sae, plugins_of

if TYPE_CHECKING:
    from ..model.loading import ModelInfo
    from .patch import Config

__all__ = ["CircuitJob", "plan_circuit", "run_circuit"]

STAGE = "patch"


@dataclass(frozen=True)
class CircuitJob:
    """What `plan_circuit` found out and `run_circuit` needs.

    Attributes:
        ablations: the one that the circuit is chosen under, and the other one.
        method: where scores come from.
        saes: hook point -> SAE, for latents.
        file: the circuit that is re-tested.
    """

    source: str | Path
    info: ModelInfo
    label: str
    pairs: Sequence[Pair]
    metric: str
    kind: str
    ablations: tuple[str, str]
    directions: tuple[str, ...]
    method: str
    plan: Plan
    saes: Mapping[str, Sae] = field(default_factory=dict)
    file: Circuit | None = None


def plan_circuit(ctx: Context, config: Config) -> CircuitJob:
    """What would be looked for, or tested.

    Raises:
        UsageError: settings that do not go together, or an unknown metric.
        InputError: the pairs, the model, an SAE or the circuit's file are not there, or do not go together.
        ManifestError: the pair file is malformed.
        AccessError: the model is gated or not cached.
    """
    file = read_circuit(config.circuit_file.expanduser()) if config.circuit_file else None
    metric = _metric(ctx, config)
    kind = file.kind if file else config.circuit_kind
    from .. import model
    from .patch import model_of_inputs

    named = [find_sae(ctx, name) for name in (config.sae or "").split(",") if name]
    fallback = named[0].model if named and named[0].model else model_of_inputs(ctx)
    source, name = chosen_model(ctx, config.model, fallback=fallback)
    info = model.describe(source, name=name, offline=ctx.offline)
    label, pairs = chosen_pairs(ctx, config, source)
    saes = _saes(ctx, config, info, named) if kind == "latents" else {}
    _must_be_of(file, info, saes)
    ablation = file.ablation if file and _unset(ctx, "corruption") else config.corruption
    method = file.method if file else _method(ctx, config, kind)
    settings: dict[str, object] = {
        **config.model_dump(include={"circuit_size", "selection", "random_sets", "min_gap", "seed", "steps"}),
        "site": kind,
        "circuit": file.sorted().to_json() if file else kind,
        "metric": [metric],
        "corruption": ablation,
        "direction": list(_directions(config, ablation)),
        "method": method,
        "model": slug(name),
        **identity_of(label, pairs),
        "sae": ",".join(sae.path.name for sae in saes.values()),
    }
    plugins = ctx.plugins.digests({"metrics": [metric]})
    for sae in saes.values():
        plugins |= plugins_of(ctx, sae)
    inputs = {f"sae {hook_point}": sae.key for hook_point, sae in saes.items()}
    identity = Identity(STAGE, settings, inputs, plugins, model_revision=info.revision)
    final = ctx.project.patches / (config.name or _default_name(label, kind, ablation, file is not None))
    facts = {
        "model": info.name,
        "pairs": len(pairs),
        "circuit of": kind,
        "scores": method if file is None else "of the file",
        "outside of it": ablation,
        "metrics": [metric],
        **({"saes": [sae.path.name for sae in saes.values()]} if saes else {}),
    }
    both = (ablation, "mean" if ablation == "counterpart" else "counterpart")
    plan = Plan(STAGE, final, identity, facts)
    return CircuitJob(
        source, info, label, pairs, metric, kind, both, _directions(config, ablation), method, plan, saes, file
    )


def run_circuit(ctx: Context, config: Config) -> Result:
    """Find or test a circuit, or say that nothing changed."""
    job = plan_circuit(ctx, config)
    final, identity = job.plan.target
    if artifact := made_already(ctx, "patch", final, identity):
        return Result(STAGE, artifact.path, artifact.summary, up_to_date=True, view=_view(artifact))
    from .circuit_search import Search

    search = Search(ctx, config, job)
    started = time.monotonic()
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        summary = search.write(w.path)
        artifact = w.seal(summary, seconds=round(time.monotonic() - started, 3))
    return Result(STAGE, artifact.path, artifact.summary, view=_view(artifact))


def _metric(ctx: Context, config: Config) -> str:
    """The one metric."""
    names = metrics_of(ctx, config)
    for wrong, what, why, fix in (
        (
            len(names) > 1,
            f"a circuit has one metric, not {len(names)}",
            "it is chosen and judged by it",
            f"use --metric {names[0]}",
        ),
        (
            config.corruption == "resample",
            "--corruption resample does not go with --circuit",
            "what stands outside of a circuit must be the same for every set",
            "use counterpart, mean or zero",
        ),
        (
            config.method == "attribution-drop",
            "--method attribution-drop does not go with --circuit",
            "it gives sizes without a direction, and a circuit is chosen by what helps",
            "use exact, attribution or eap-ig",
        ),
        (
            bool(config.latent),
            "--latent does not go with --circuit",
            "a circuit chooses its latents, or names them in its file",
            "leave it out, or use --circuit-file",
        ),
    ):
        if wrong:
            raise UsageError(what, why=why, fix=fix)
    return names[0]


def _unset(ctx: Context, name: str) -> bool:
    return ctx.origins.get(name, "default") == "default"


def _method(ctx: Context, config: Config, kind: str) -> str:
    """Exact scores where they are cheap or wanted; edges and latents are too many to be patched one by one unasked."""
    return "eap-ig" if config.method == "exact" and kind != "nodes" and _unset(ctx, "method") else config.method


def _directions(config: Config, ablation: str) -> tuple[str, ...]:
    return ("denoising", "noising") if config.direction == "both" else (config.direction,)


def _default_name(label: str, kind: str, ablation: str, tested: bool) -> str:
    """PAIRS-circuit-KIND, and what is not the default."""
    more = [ablation] if ablation != "counterpart" else []
    return "-".join([label, "circuit", kind, *more, *(["tested"] if tested else [])])


def _saes(ctx: Context, config: Config, info: ModelInfo, named: Sequence[Sae]) -> dict[str, Sae]:
    """hook point -> SAE: those that were named, or the newest one of the project at each place of the model's stream.

    Raises:
        InputError: there is none, or a named one does not fit.
    """
    if not named:
        every = [find_sae(ctx, a.path.name) for a in sealed_under(ctx.project.saes, "train")]
        named = [sae for sae in every if sae.revision in (None, info.revision) and sae.d_in == info.d_model]
        named = [sae for sae in named if sae.hook_point]
    if not named:
        raise InputError(
            f"there is no sparse autoencoder of {info.name} yet",
            why=f"{ctx.project.saes} holds none that reads its stream",
            fix="run `greatctl train` first, at one layer or several",
        )
    for sae in named:
        must_fit(config.model_copy(update={"latent": [], "layer_window": None}), info, sae)
    return {str(sae.hook_point): sae for sae in named}


def _must_be_of(file: Circuit | None, info: ModelInfo, saes: Mapping[str, Sae]) -> None:
    """A circuit speaks of one model and of its SAEs.

    Raises:
        InputError: this is another one.
    """
    if file is None:
        return
    if file.model_revision not in ("", info.revision):
        raise InputError(
            "the circuit is of another model",
            why=f"it was found in {file.model or 'a model'}, revision {file.model_revision[:12]}; this is {info.name}, "
            f"revision {info.revision[:12]}",
            fix=f"use --model {file.model}" if file.model else "name its model with --model",
            code="another-model",
        )
    for hook_point, key in file.saes.items():
        if hook_point not in saes or saes[hook_point].key != key:
            raise InputError(
                "the circuit is of another sparse autoencoder",
                why=f"its latents at {hook_point} belong to one that is not in use now",
                fix="name its SAEs with --sae, separated by commas",
                code="another-sae",
            )


def _view(artifact: Artifact) -> dict[str, Any]:
    """The curve for the terminal's table, and the refused pairs."""
    from ..store.tables import read_rows

    rows = read_rows(artifact.path / "pairs.parquet", ["id", "status", "reason"])
    return {
        "curve": read_rows(artifact.path / "curve.parquet"),
        "refused": [(row["id"], row["reason"]) for row in rows if row["status"] == "refused"],
    }
