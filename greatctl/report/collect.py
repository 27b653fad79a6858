"""From sealed artifacts to a view: one function a section, each reading tables and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..store.artifact import Artifact
from . import circuits, corpus, explore, features, hypotheses, labels, patches, provenance, sae, sections
from .tables import rows
from .view import Block, Finding, Label, Prose, Section, View

__all__ = ["Parts", "view"]


@dataclass(frozen=True)
class Parts:
    """The artifacts that the page tells of; what is not made yet is None.

    Attributes:
        sae: the autoencoder that `features` are of, or the newest; `controls` are its companions.
        saes: every autoencoder of the project.
        labels: what a labeler called the latents of `features`.
        patches: name -> patching run.
        sources: source id -> what `fetch` kept of it.
        others: further artifacts that one of these was made from.
    """

    tokens: Artifact | None = None
    activations: Artifact | None = None
    sae: Artifact | None = None
    controls: Artifact | None = None
    features: Artifact | None = None
    labels: Artifact | None = None
    saes: Sequence[Artifact] = ()
    patches: Mapping[str, Artifact] = field(default_factory=dict)
    sources: Mapping[str, Artifact] = field(default_factory=dict)
    others: Sequence[Artifact] = ()

    def all(self) -> list[Artifact]:
        """Every artifact but the sources, in the order of the experiment."""
        single = (self.tokens, self.activations, self.sae, self.controls, self.features, self.labels)
        return [*(a for a in single if a), *self.patches.values(), *self.saes, *self.others]


def view(parts: Parts, *, plugin_sections: Sequence[Mapping], root: Path, latents: int, rules: str) -> View:
    """The report of what is there; what is not made yet is named.

    Args:
        plugin_sections: checked sections of plugins.
        root: the project's folder; paths are shown relative to it.
        latents: how many latents get a page.
        rules: the written rules of the verdicts.
    """
    found = parts.features
    pages = features.chosen(found, latents) if found else []
    named = labels.read(parts.labels)
    made = [
        Section("hypotheses", "Hypotheses and what stands against them", _hypotheses(found, rules, pages, named)),
        Section("latents", "Latents", _latents(parts, pages, named)),
        Section("patching", "Patching", _patching(parts.patches)),
        *sections.of_plugins(plugin_sections),
        Section("autoencoder", "The autoencoder", _sae(parts)),
        Section("corpus", "The texts", _corpus(parts)),
        Section("provenance", "Provenance", provenance.section(parts.all(), parts.sources, root)),
    ]
    return View("Greatness, as hypotheses that can fail", _subtitle(parts), _findings(parts), made)


def _subtitle(parts: Parts) -> str:
    if parts.tokens is None:
        return "No text has been read yet."
    model = f", read by {_json(parts.activations, 'meta.json')['model']}" if parts.activations else ""
    documents = rows(parts.tokens.path / "documents.parquet", ["document"])
    return f"{len(documents)} texts, {parts.tokens.summary['n_tokens']:,} tokens{model}."


def _findings(parts: Parts) -> list[Finding]:
    found: list[Finding] = hypotheses.findings(parts.features) if parts.features else []
    found += [_of(artifact).finding(name, artifact) for name, artifact in parts.patches.items()]
    if parts.sae:
        found.append(sae.finding(parts.sae, parts.saes))
    return found


def _missing(command: str, what: str) -> list[Block]:
    return [Prose(f"{what} is not made yet: greatctl {command}", quiet=True)]


def _corpus(parts: Parts) -> list[Block]:
    if parts.tokens is None:
        return _missing("tokenize", "The set of token windows")
    return corpus.section(parts.tokens, parts.sources)


def _sae(parts: Parts) -> list[Block]:
    if parts.sae is None:
        return _missing("train", "An autoencoder")
    return sae.section(parts.sae, parts.controls, parts.saes)


def _hypotheses(
    interpreted: Artifact | None, rules: str, pages: Sequence[int], named: Mapping[int, Label]
) -> list[Block]:
    return (
        hypotheses.section(interpreted, rules, pages, named) if interpreted else _missing("interpret", "The contrast")
    )


def _latents(parts: Parts, pages: Sequence[int], named: Mapping[int, Label]) -> list[Block]:
    if parts.features is None:
        return _missing("interpret", "The table of latents")
    return [
        *labels.introduction(parts.labels, named),
        *features.cards(parts.features, parts.tokens, pages, named),
        *explore.index(parts.features, pages, named),
    ]


def _patching(patched: Mapping[str, Artifact]) -> list[Block]:
    if not patched:
        return _missing("patch", "A patching run")
    sweeps_first = sorted(patched.items(), key=lambda run: _of(run[1]) is circuits)
    return [block for name, artifact in sweeps_first for block in _of(artifact).section(name, artifact)]


def _of(patched: Artifact) -> Any:
    """Who tells of a patching run: one that found or tested a circuit, or one that swept cells."""
    return circuits if "circuit" in patched.summary else patches


def _json(artifact: Artifact, name: str) -> Any:
    return json.loads((artifact.path / name).read_bytes())
