"""From sealed artifacts to a view: one function a section, each reading tables and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..store.artifact import Artifact
from ..store.tables import read_rows
from . import corpus, features, patches, sae
from .view import Block, Prose, Section, Table, View

__all__ = ["view"]


def view(
    *,
    tokens: Artifact | None,
    activations: Artifact | None,
    sae: Artifact | None,
    features: Artifact | None,
    patches: Mapping[str, Artifact],
    plugin_sections: Sequence[Mapping],
    root: Path,
    latents: int,
    rules: str,
    controls: Artifact | None = None,
) -> View:
    """The report of what is there; what is not made yet is named.

    Args:
        patches: `patch/NAME` -> artifact.
        plugin_sections: checked sections of plugins.
        root: the project's folder; paths are shown relative to it.
        latents: how many latents get a card.
        rules: the written rules of the verdicts.
        controls: the companions of `sae`.
    """
    sections = [
        Section("corpus", "The texts", _corpus(tokens)),
        Section("autoencoder", "The autoencoder", _sae(sae, activations, controls)),
        Section("hypotheses", "Characters against controls", _hypotheses(features, rules)),
        Section("latents", "Latents", _latents(features, latents)),
        Section("patching", "Patching", _patching(patches)),
        *_plugins(plugin_sections),
        Section("provenance", "Provenance", _provenance(tokens, activations, sae, features, patches, root)),
    ]
    return View(
        "Greatness, as hypotheses that can fail",
        _subtitle(tokens, activations),
        _findings(sae, features, patches),
        sections,
    )


def _subtitle(tokens: Artifact | None, activations: Artifact | None) -> str:
    if tokens is None:
        return "No text has been read yet."
    model = f", read by {_json(activations, 'meta.json')['model']}" if activations else ""
    documents = read_rows(tokens.path / "documents.parquet", ["document"])
    return f"{len(documents)} texts, {tokens.summary['n_tokens']:,} tokens{model}."


def _findings(trained: Artifact | None, interpreted: Artifact | None, patched: Mapping[str, Artifact]) -> list[str]:
    found = []
    if trained:
        found.append(sae.finding(trained.summary))
    if interpreted:
        found.append(features.finding(interpreted))
    found += [patches.finding(name.removeprefix("patch/"), a.summary) for name, a in patched.items()]
    return found


def _missing(command: str, what: str) -> list[Block]:
    return [Prose(f"{what} is not made yet: greatctl {command}", quiet=True)]


def _corpus(tokens: Artifact | None) -> list[Block]:
    return corpus.section(tokens) if tokens else _missing("tokenize", "The set of token windows")


def _sae(trained: Artifact | None, activations: Artifact | None, controls: Artifact | None) -> list[Block]:
    return sae.section(trained, activations, controls) if trained else _missing("train", "An autoencoder")


def _hypotheses(interpreted: Artifact | None, rules: str) -> list[Block]:
    return features.hypotheses(interpreted, rules) if interpreted else _missing("interpret", "The contrast")


def _latents(interpreted: Artifact | None, count: int) -> list[Block]:
    return features.cards(interpreted, count) if interpreted else _missing("interpret", "The table of latents")


def _patching(patched: Mapping[str, Artifact]) -> list[Block]:
    if not patched:
        return _missing("patch", "A patching run")
    return [block for name, a in patched.items() for block in patches.section(name.removeprefix("patch/"), a)]


def _plugins(sections: Sequence[Mapping]) -> list[Section]:
    made = []
    for number, section in enumerate(sections):
        blocks: list[Block] = [
            Prose(str(b["text"])) if b["kind"] == "prose" else Table(list(b["columns"]), list(b["rows"]))
            for b in section["blocks"]
        ]
        blocks.append(Prose(f"From the plugin {section.get('plugin', 'unknown')}.", quiet=True))
        made.append(Section(f"plugin-{number}", str(section["title"]), blocks))
    return made


def _provenance(
    tokens: Artifact | None,
    activations: Artifact | None,
    trained: Artifact | None,
    interpreted: Artifact | None,
    patched: Mapping[str, Artifact],
    root: Path,
) -> list[Block]:
    rows: list[list] = []
    for artifact in (tokens, activations, trained, interpreted, *patched.values()):
        if artifact is None:
            continue
        settings = ", ".join(f"{k} {v}" for k, v in artifact.config.items() if not isinstance(v, dict | list))
        made_from = ", ".join(f"{k} {str(v)[:12]}" for k, v in dict(artifact.record["inputs"]).items())  # type: ignore[call-overload]
        path = _relative(artifact.path, root)
        rows.append([artifact.stage, path, artifact.fingerprint[:12], settings, _short(made_from)])
    versions = tokens.record["versions"] if tokens else {}
    words = (
        "Fingerprints say what was asked for; every file's sha256 is in the artifact.json beside it (greatctl verify)."
    )
    used = ", ".join(f"{k} {v}" for k, v in versions.items())  # type: ignore[union-attr]
    return [
        Prose(words),
        Table(["stage", "artifact", "fingerprint", "settings", "made from"], rows),
        Prose(used, quiet=True),
    ]


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _short(text: str) -> str:
    return text if len(text) < 160 else text[:150] + " …"


def _json(artifact: Artifact, name: str) -> Any:
    return json.loads((artifact.path / name).read_bytes())
