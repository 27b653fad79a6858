"""The evidence of `interpret`: gathers what concepts, baselines and interventions need, and lets `features` weigh it.

Joins the rooms: documents and texts come from the token store, raw sums and latents from the feature pass, companions
from `train --controls`, interventions from `causal`. One pass reads all companions; the companion of the random model
reads that model again, on a few windows of each document.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..features.concepts import Concept
from ..store.artifact import Artifact
from ..store.tables import write_table
from .context import Context

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ..corpus.windows import TokenStore
    from ..features.baselines import Material
    from ..features.hypotheses import Evidence, Weighed
    from ..features.tables import FeatureTables
    from ..model.interface import FrozenModel
    from ..sae.folder import LoadedSAE

__all__ = ["Inputs", "write_all"]

_TEXT_WINDOWS = 128  # windows of each document that stylometry reads
_CONTROL_WINDOWS = 32  # windows of each document that the random model reads
_BATCH = 16
_WORD = re.compile(r"\w+$")
_START = re.compile(r"^\w+")


@dataclass(frozen=True)
class Inputs:
    """What one SAE is weighed on. `folder` holds the feature tables, which are written already."""

    store: TokenStore
    tables: FeatureTables
    sae: LoadedSAE
    model: FrozenModel
    activations: Artifact
    meta: Mapping[str, Any]
    controls: Artifact | None
    folder: Path
    alive: Sequence[int]
    unit: str
    device: str


def write_all(
    ctx: Context, inputs: Inputs, concepts: Sequence[Concept], *, n_candidates: int, n_causal: int, seed: int
) -> list[Evidence]:
    """Weigh every concept and write contrasts, hypotheses, evidence, baselines and causal.parquet.

    Args:
        n_causal: latents of each concept that are changed in the running model.
    """
    import pyarrow as pa

    from ..features.baselines import baselines
    from ..features.hypotheses import Known, assemble, weigh_concept, write_evidence

    documents, means, material = _documents(ctx, inputs), _means(inputs), _material(ctx, inputs, seed)
    stretches = inputs.tables.stretch_tokens.numpy(), inputs.tables.stretch_total.numpy()
    found, trials = [], []
    for concept in concepts:
        weighed = weigh_concept(
            concept, means, documents, inputs.unit, inputs.alive,
            n_candidates=n_candidates, stretches=stretches, seed=seed,
        )  # fmt: skip
        ctx.run.stop_here()
        part = _part(material, weighed.places)
        measured = baselines(weighed.cells, weighed.rows, part, n_candidates=n_candidates, seed=seed)
        facts = _facts(ctx, inputs, weighed)
        first = assemble(weighed, measured, Known(**facts), seed=seed)
        ctx.run.stop_here()
        tried = [row["latent"] for row in first.rows[:n_causal]]
        causal, table = _causal(ctx, inputs, weighed, tried, seed)
        found.append(assemble(weighed, measured, Known(**facts, causal=causal), seed=seed) if causal else first)
        if table is not None:
            trials.append(table.add_column(0, "concept", pa.array([concept.name] * len(table), pa.string())))
    write_evidence(inputs.folder, found)
    if trials:
        write_table(inputs.folder / "causal.parquet", pa.concat_tables(trials))
    return found


def _documents(ctx: Context, inputs: Inputs) -> list[dict[str, object]]:
    """The documents with the kind of their source, which concepts may choose by."""
    kinds = {entry.id: entry.kind for entry in ctx.project.manifest.entries}
    return [{**row, "kind": kinds.get(str(row.get("source_id")))} for row in inputs.store.documents]


def _means(inputs: Inputs) -> NDArray[np.float64]:
    """Mean latents of each document, NaN where none of it was read."""
    means = inputs.tables.document_means.copy()
    means[inputs.tables.document_tokens.numpy() == 0] = np.nan
    return means


def _material(ctx: Context, inputs: Inputs, seed: int) -> Material:
    from ..features.baselines import Material

    ctx.run.notice("interpret: measuring what latents have to beat")
    controls = _companions(ctx, inputs)
    return Material(inputs.tables.document_x_means, _texts(inputs), controls)


def _part(material: Material, places: Sequence[int]) -> Material:
    """The material of some documents."""
    from ..features.baselines import Material

    at = list(places)
    return Material(
        material.residual[at] if material.residual is not None else None,
        [material.texts[i] for i in at] if material.texts is not None else None,
        {name: [means[at] for means in several] for name, several in material.controls.items()},
    )


def _chosen(store: TokenStore, n: int) -> list[int]:
    """Up to n windows of each document, evenly spaced, in order."""
    owner = np.asarray(store.windows["document"])
    chosen = []
    for document in np.unique(owner):
        windows = np.flatnonzero(owner == document)
        chosen += windows[
            np.unique(np.linspace(0, len(windows) - 1, min(n, len(windows))).round().astype(int))
        ].tolist()
    return sorted(chosen)


def _texts(inputs: Inputs) -> list[str]:
    """Some text of each document, as the model read it."""
    from ..features.examples import Decoder

    store = inputs.store
    decoder = Decoder(inputs.model.tokenizer, store.tokenizer["special_ids"])
    parts: list[list[str]] = [[] for _ in store.documents]
    for window in _chosen(store, _TEXT_WINDOWS):
        ids = store.input_ids[window, : int(store.length[window])].tolist()
        parts[int(store.windows["document"][window])].append(decoder.decode(ids))
    return [" ".join(part) for part in parts]


def _companions(ctx: Context, inputs: Inputs) -> dict[str, list[NDArray[np.float64]]]:
    """Mean latents of each document in each companion, by the baseline that it belongs to."""
    from ..features.baselines import FROZEN, SEEDS, UNTRAINED
    from ..sae.folder import load as load_sae
    from .feature_pass import control_means

    if inputs.controls is None:
        return {}
    names = {"frozen-decoder": FROZEN, "seed-1": SEEDS, "seed-2": SEEDS}
    registry = ctx.plugins.registry if ctx.plugins else None
    folder = inputs.controls.path
    saes = {name: load_sae(folder / name, registry, device=inputs.device) for name in names if (folder / name).is_dir()}
    sums = control_means(ctx, saes, inputs.activations, inputs.store, device=inputs.device) if saes else {}
    tokens = inputs.tables.document_tokens.clamp_min(1)[:, None]
    found: dict[str, list[NDArray[np.float64]]] = {}
    for name, total in sums.items():
        found.setdefault(names[name], []).append((total / tokens).numpy())
    if (folder / "random-model").is_dir():
        sae = load_sae(folder / "random-model", registry, device=inputs.device)
        found[UNTRAINED] = [_of_random_model(ctx, inputs, sae)]
    return found


def _of_random_model(ctx: Context, inputs: Inputs, sae: LoadedSAE) -> NDArray[np.float64]:
    """Mean latents of each document when the companion reads the random model that it was trained on."""
    import torch

    from ..features.tables import scan_means
    from ..model.interface import Site
    from ..model.untrained import write_untrained
    from ..sae.data import derive
    from .models import open_model, resolve

    ctx.run.notice("interpret: reading some windows with the random model")
    site, folder = str(inputs.meta["hook_point"]), inputs.folder / "untrained-model"
    assert inputs.controls is not None
    layers = 1 + Site.parse(site).layer
    shutil.rmtree(folder, ignore_errors=True)
    source, _ = resolve(str(inputs.meta["model"]))
    seed = derive(_first_seed(inputs.controls), "random-model")
    write_untrained(source, folder, layers=layers, seed=seed, device=inputs.device, offline=ctx.offline)
    model = open_model(ctx, str(folder), upto=layers)
    shutil.rmtree(folder)
    store, chosen = inputs.store, _chosen(inputs.store, _CONTROL_WINDOWS)
    owner = [int(store.windows["document"][i]) for i in chosen]
    totals = scan_means(
        _shards(ctx, model, store.input_ids[chosen], store.length[chosen], site, str(inputs.meta["dtype"])),
        {"latents": sae.encode},
        {"latents": sae.d_sae},
        owner,
        n_documents=len(store.documents),
        special_ids=store.tokenizer["special_ids"],
        device=inputs.device,
    )["latents"]
    special = torch.tensor(store.tokenizer["special_ids"], dtype=store.input_ids.dtype)
    tokens = torch.zeros(len(store.documents), dtype=torch.float64)
    for window, document in zip(chosen, owner, strict=True):
        ids = store.input_ids[window, : int(store.length[window])]
        tokens[document] += int((~torch.isin(ids, special)).sum())
    return (totals / tokens.clamp_min(1)[:, None]).numpy()


def _first_seed(controls: Artifact) -> int:
    """The seed of the SAE itself, from which that of the random model is derived."""
    rows = json.loads((controls.path / "comparison.json").read_bytes())
    return int(rows[0]["seed"])


def _shards(
    ctx: Context, model: FrozenModel, ids: Tensor, length: Tensor, site: str, dtype: str
) -> Iterator[Mapping[str, Tensor]]:
    from ..model.reading import read

    for start in range(0, len(length), 4 * _BATCH):
        span = range(start, min(start + 4 * _BATCH, len(length)))
        yield read(model, ids, length, span, [site], dtype=dtype, batch_size=_BATCH, shard=start)[site]
        ctx.run.stop_here()


def _facts(ctx: Context, inputs: Inputs, weighed: Weighed) -> dict[str, Any]:
    """What the feature tables and the companions' table say of the candidates."""
    wanted, shared = weighed.candidates, ("token_share", "position_share")
    latents = _rows_of(inputs.folder / "latents.parquet", wanted, ["latent", *shared])
    examples = _rows_of(inputs.folder / "examples.parquet", wanted, ["latent", "kind", "before", "token", "after"])
    shares = {name: {row["latent"]: row[name] for row in latents if row[name] is not None} for name in shared}
    kinds = {row["kind"] for row in examples}
    return {
        **shares,
        "cosines": _cosines(inputs.controls, wanted),
        "on_words": _on_words(examples, _words(ctx, weighed)),
        "whole_range": {"decile", "near"} <= kinds,
    }


def _rows_of(path: Path, latents: Sequence[int], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of some latents; the table may hold many thousands more."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=columns, filters=pc.field("latent").isin(list(latents))).to_pylist()


def _cosines(controls: Artifact | None, wanted: Sequence[int]) -> dict[int, list[float]]:
    if controls is None or not (controls.path / "latents.parquet").is_file():
        return {}
    rows = _rows_of(controls.path / "latents.parquet", wanted)
    return {row["latent"]: [v for k, v in row.items() if re.fullmatch(r"seed_\d+_cosine", k)] for row in rows}


def _words(ctx: Context, weighed: Weighed) -> set[str]:
    """The concept's own words, and the names of the people that it is about."""
    people = {str(row.get("character")) for row in weighed.rows if row["role"] == "character"}
    names = [c.name for c in ctx.project.manifest.characters if c.id in people]
    parts = {part.lower() for name in names for part in re.findall(r"\w{4,}", name)}
    return parts | set(weighed.concept.leave_out)


def _on_words(examples: Sequence[Mapping[str, Any]], words: set[str]) -> dict[int, float]:
    """Share of each latent's strongest passages whose strongest token lies inside one of the words."""
    hits: dict[int, list[bool]] = {}
    for row in examples:
        if row["kind"] == "top":
            before, after = _WORD.search(row["before"]), _START.search(row["after"])
            token = str(row["token"])
            whole = (before[0] if before and token[:1].isalnum() else "") + token.strip()
            whole += after[0] if after and token[-1:].isalnum() else ""
            hits.setdefault(row["latent"], []).append(whole.strip().lower().removesuffix("’s") in words)
    return {latent: sum(found) / len(found) for latent, found in hits.items()}


def _causal(
    ctx: Context, inputs: Inputs, weighed: Weighed, latents: Sequence[int], seed: int
) -> tuple[dict[int, dict[str, float]], pa.Table | None]:
    """What changing the latents does to the concept's held-out pairs; nothing where it cannot be tried."""
    import torch

    from .branches import held_out_windows
    from .causal import causal_evidence

    if not latents or not weighed.concept.pairs:
        return {}, None
    ctx.run.notice(f"interpret: changing {len(latents)} latents in the running model ({weighed.concept.name})")
    tables, role = inputs.tables, np.array([row["role"] == "character" for row in weighed.rows])
    train = np.array([row.get("split") in (None, "", "train") for row in weighed.rows])
    raw = tables.document_x_means[weighed.places]
    line = {}
    if (role & train).any() and (~role & train).any():
        difference = raw[role & train].mean(axis=0) - raw[~role & train].mean(axis=0)
        line = {"difference of means": torch.from_numpy(difference).float()}
    try:
        return causal_evidence(
            ctx,
            inputs.model,
            inputs.sae,
            latents,
            weighed.concept.pairs,
            windows=held_out_windows(inputs.store, n_ctx=inputs.model.n_ctx),
            density=tables.fired.double() / max(tables.n_tokens, 1),
            peaks={latent: float(tables.peak[latent]) for latent in latents},
            baselines=line,
            seed=seed,
        )
    except InputError as error:  # an SAE that writes elsewhere than it reads cannot be changed in place
        ctx.run.notice(f"interpret: no causal evidence, because {error.message}")
        return {}, None
