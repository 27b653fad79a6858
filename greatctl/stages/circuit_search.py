"""The work of `patch --circuit`: both ends of every pair, the scores, the set, and what it is worth, step by step.

Scores are the dear part where they are exact, so they are on disk before anything is chosen by them, and a killed run
goes on behind them. Everything else is a few hundred runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..model.tokenizer import encode, load_tokenizer
from ..patching.circuits import Circuit
from ..patching.components import ERROR, ComponentRuns, GraphRuns, LatentRuns, unfit
from ..patching.copying import ATTENDS, TwoStep, previous_token_scores, two_step
from ..patching.edges import edge_effects
from ..patching.faithfulness import Ends
from ..patching.graph import graph
from ..patching.metrics import measure
from ..patching.pairs import EncodedPair, Refusal, clusters_of, encode_pairs
from ..patching.runs import CLEAN, CORRUPTED, prepare
from ..patching.scoring import score
from ..patching.study import choose, curve, judge, split
from ..patching.units import groups
from ..patching.writes import edge_group
from ..store.tables import read_columns, write_table
from . import circuit_tables
from .circuit_tables import Measured
from .context import Context
from .models import open_model
from .pair_sets import COPYING
from .saes import open_sae

if TYPE_CHECKING:
    from ..extend.contracts import PatchMetric
    from .circuits import CircuitJob
    from .patch import Config

__all__ = ["Search"]

_SCORES = "components.parquet"


class Search:
    """One run, from open model to tables."""

    def __init__(self, ctx: Context, config: Config, job: CircuitJob) -> None:
        self.ctx, self.config, self.job = ctx, config, job
        self.metric: tuple[str, PatchMetric] = (job.metric, ctx.plugins.registry.get("metrics", job.metric)())
        self.model = open_model(ctx, job.info.name)
        self.saes: dict[str, Any] = {
            hook_point: _autoencoder(open_sae(ctx, sae, str(self.model.device)), hook_point, sae.path.name)
            for hook_point, sae in job.saes.items()
        }
        self.refused: list[Refusal] = []
        self.ends: dict[str, tuple[float, float]] = {}
        self.words: dict[str, tuple[list[str], list[str]]] = {}
        self.executed = self._with_a_gap(self._encoded())
        if not self.executed:
            raise InputError(
                f"none of the {len(job.pairs)} pairs can be used with {job.info.name}",
                why="; ".join(f"{r.pair.id}: {r.reason}" for r in self.refused[:5]),
                fix="name a file with --pairs whose prompts correspond place by place and tell the answers apart",
                code="no-usable-pair",
            )
        held = [pair for pair in self.executed if pair.pair.heldout]
        others = [pair for pair in self.executed if not pair.pair.heldout]
        self.parts = [*groups(others), *groups(held)]

    def write(self, folder: Path) -> dict[str, object]:
        """Find or test the circuit under both ablations and write all tables; returns the summary."""
        first, second = (self._runs(ablation) for ablation in self.job.ablations)
        pairs = first.pairs
        rows = split([pair.pair.heldout for pair in pairs])
        clusters = clusters_of([pair.pair for pair in pairs])
        scores = self._scores(folder, first, rows[0])
        ends = Ends.of(first)
        if self.job.file is None:
            self._say("choosing", 0, 1)
            wanted = self.config.circuit_size
            keep = choose(
                first, ends, scores, rows[0], selection=self.config.selection, size=wanted, wiring=first.wiring
            )
        else:
            keep = self.job.file.mask(first.names)
            scores = _scores_of(self.job.file, first.names) if not scores.any() else scores
        judged = judge(
            first,
            ends,
            keep,
            scores,
            rows,
            clusters,
            draws=self.config.random_sets,
            seed=self.config.seed,
            wiring=first.wiring,
            strata=first.strata,
            progress=self._say,
        )
        measured = []
        for runs in (first, second):
            own = ends if runs is first else Ends.of(runs)
            both = np.stack([judged.values, judged.without]) if runs is first else runs.values(np.stack([keep, ~keep]))
            line = curve(runs, own, scores, rows[1], clusters, wiring=runs.wiring)
            measured.append(Measured(runs.ablation, own, line, both))
            self._say("curves", len(measured), 2)
        circuit = self._circuit(first.names, keep, scores)
        return circuit_tables.write(self, folder, circuit, first, scores, judged, measured, rows, clusters)

    def errors(self, runs: ComponentRuns, ends: Ends, judging: np.ndarray) -> dict[str, float] | None:
        """For latents: f of the error terms alone, and of all latents without them, over the judging pairs."""
        if self.job.kind != "latents":
            return None
        those = np.array([name.endswith(f"#{ERROR}") for name in runs.names])
        alone, without = ends.share(runs.values(np.stack([those, ~those]), judging), judging).tolist()
        return {"alone": alone, "without": without}

    def two_step(self, judges: Sequence[EncodedPair]) -> TwoStep | None:
        """For copying and edges: whether the two-step circuit does it, over the judging pairs."""
        if self.job.label != COPYING or self.job.kind != "edges":
            return None
        parts, own = groups(judges), graph(self.model)
        seen = [previous_token_scores(self.model, members) for members in parts]
        attention = {head: float(np.mean([one[head] for one in seen])) for head in seen[0]}
        keys = own.select(["a*->a*.k"]) if own.n_layers > 1 else []
        keys = [edge for edge in keys if attention[edge.sender.name] >= ATTENDS]
        clean, corrupted, patched = [], [], []
        for members in parts if keys else []:
            found = edge_effects(
                self.model, edge_group(self.model, members), dict([self.metric]), "denoising", edges=keys
            )
            clean.append(found.clean[self.job.metric])
            corrupted.append(found.corrupted[self.job.metric])
            patched.append(found.values[self.job.metric][:, :, 0])
        if not keys:
            return TwoStep(False, 0.0, (), 0.0, "no head attends to the previous token")
        ends = [np.concatenate(some) for some in (clean, corrupted)]
        effects = (np.concatenate(patched) - ends[1][:, None]).sum(0) / (ends[0] - ends[1]).sum()
        names = [edge.name for edge in found.edges]
        return two_step(dict(zip(names, effects, strict=True)), attention, *ends)

    def _encoded(self) -> list[EncodedPair]:
        tokenizer = load_tokenizer(self.job.source, offline=self.ctx.offline)
        encoded, refused = encode_pairs(
            self.job.pairs, lambda text: encode(tokenizer, text), n_ctx=self.job.info.n_ctx, plain=False
        )
        self.refused += refused
        if self.job.kind == "latents":
            self.refused += [Refusal(pair.pair, unfit(pair)) for pair in encoded if unfit(pair)]
            encoded = [pair for pair in encoded if not unfit(pair)]
        return encoded

    def _with_a_gap(self, encoded: Sequence[EncodedPair]) -> list[EncodedPair]:
        """Measure both ends of every pair; a pair whose runs do not differ is refused, with the number."""
        kept = []
        for members in groups(encoded):
            group = prepare(self.model, members, "resid_pre", layers=())
            ends = [measure(*self.metric, group.logits[run], group.end_answers(run)) for run in (CLEAN, CORRUPTED)]
            for pair, clean, corrupted in zip(members, *(values.tolist() for values in ends), strict=True):
                gap = clean - corrupted
                if abs(gap) < self.config.min_gap or gap == 0:
                    why = (
                        f"the runs differ by {gap:.3g} in {self.job.metric}; --min-gap asks for {self.config.min_gap:g}"
                    )
                    self.refused.append(Refusal(pair.pair, why))
                    continue
                kept.append(pair)
                self.ends[pair.pair.id] = (clean, corrupted)
                decode = self.model.tokenizer.decode
                words = [[decode([i]) for i in ids] for ids in (pair.clean_ids, pair.corrupted_ids)]
                self.words[pair.pair.id] = words[0], words[1]
        for refusal in self.refused:
            self.ctx.run.notice(f"patch: pair {refusal.pair.id!r} refused: {refusal.reason}")
        return kept

    def _runs(self, ablation: str) -> ComponentRuns:
        if self.job.kind == "latents":
            return LatentRuns(self.model, self.parts, self.metric, ablation, self.saes)
        return GraphRuns(self.model, self.parts, self.metric, ablation, self.job.kind)

    def _scores(self, folder: Path, runs: ComponentRuns, rows: np.ndarray) -> np.ndarray:
        """The score of every component; those of an interrupted run, where they are there."""
        path = folder / _SCORES
        if path.is_file():
            found = read_columns(path, ["component", "score"])
            if found["component"] == list(runs.names):
                return np.array(found["score"])
        if self.job.file is not None:
            return np.zeros(len(runs.names))
        scores = score(
            runs,
            self.job.kind,
            rows,
            self.metric,
            method=self.job.method,
            steps=self.config.steps,
            directions=self.job.directions,
            progress=lambda done, total: self._say("scores", done, total, stops=False),
        )
        write_table(path, {"component": list(runs.names), "score": scores.tolist()})
        self.ctx.run.stop_here()
        return scores

    def _circuit(self, names: Sequence[str], keep: np.ndarray, scores: np.ndarray) -> Circuit:
        inside = np.flatnonzero(keep).tolist()
        own = tuple(names[at] for at in inside), tuple(float(f"{scores[at]:.6g}") for at in inside)
        if self.job.file is not None:
            return replace(self.job.file, components=own[0], scores=own[1])
        return Circuit(
            self.config.circuit_kind,
            *own,
            model=self.job.info.name,
            model_revision=self.job.info.revision or "",
            metric=self.job.metric,
            pairs=self.job.label,
            ablation=self.job.ablations[0],
            selection=self.config.selection,
            method=self.job.method,
            saes={hook_point: sae.key for hook_point, sae in self.job.saes.items()},
        )

    def _say(self, what: str, done: int, total: int, *, stops: bool = True) -> None:
        self.ctx.run.progress(f"patch: {what}", done, total, "")
        if stops:
            self.ctx.run.stop_here()


def _scores_of(file: Circuit, names: Sequence[str]) -> np.ndarray:
    """The file's scores in their places; what is not in it has 0."""
    known = dict(zip(file.components, file.scores, strict=True))
    return np.array([known.get(name, 0.0) for name in names])


def _autoencoder(sae: Any, hook_point: str, name: str) -> Any:
    """The SAE, if it writes where it reads.

    Raises:
        InputError: it is a transcoder.
    """
    target = getattr(sae, "target_hook_point", None)
    if target not in (None, hook_point):
        raise InputError(
            f"{name} is a transcoder: it reads {hook_point} and writes {target}",
            why="its latents explain another activation than the one they are read from",
            fix="name autoencoders with --sae",
            code="transcoder",
        )
    return sae
