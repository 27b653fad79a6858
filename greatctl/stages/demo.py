"""The demonstration project: thirty bundled sketches, the bundled model, and what came out, in plain words.

`make_project` writes an ordinary project (sources.toml and the texts to import), so that every other command can be used
in it afterwards. `findings` reads the stages' summaries and says the most interesting things that they can bear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..reference import SampleText, texts
from ..store.files import make_dir, write_bytes, write_text
from ..store.tables import read_rows

__all__ = ["findings", "make_project", "source_id"]

_HEADER = """\
# The demonstration project of greatctl: thirty short sketches written for it, fifteen of the characters and fifteen of
# ordinary people, labelled by era, genre and topic. They have one author, so the unit of every contrast is the subject.
# Everything here is an ordinary manifest: change a value, run `greatctl status`, and see what became stale.

[model]
name = "bundled"

[interpret]
unit = "subject"

[train]
arch = "batchtopk"
expansion = 8
k = 32
epochs = 8
batch_size = 1024
ce_windows = 24

[patch]
pairs = "greatness"
"""

_ENTRY = """
[[{table}]]
id = {id}
kind = "manual"
{character}title = {title}
author = "The greatctl authors"
first_published = "2026"
rights = "MIT"
where = "comes with greatctl; `greatctl demo` imports it"
era = {era}
genre = {genre}
topic = {topic}
translated = false
split = {split}
"""


def source_id(text: SampleText) -> str:
    """The manifest id of a bundled text: `sketch-churchill`; a control's is its own (`bank-teller`)."""
    return f"sketch-{text.id}" if text.role == "character" else text.id


def make_project(folder: Path) -> list[tuple[str, Path]]:
    """Write sources.toml (unless it is there) and `texts/` into `folder`; returns (source id, file) to import."""
    make_dir(folder / "texts")
    manifest = folder / "sources.toml"
    if not manifest.exists():
        write_text(manifest, _manifest())
    imports = []
    for text in texts():
        target = folder / "texts" / text.path.name
        data = text.path.read_bytes()
        if not target.exists() or target.read_bytes() != data:
            write_bytes(target, data)
        imports.append((source_id(text), target))
    return imports


def _manifest() -> str:
    parts = [_HEADER]
    samples = sorted(texts(), key=lambda t: (t.role != "character", t.id))
    for text in samples:
        if text.role == "character":
            parts.append(f'\n[[character]]\nid = "{text.id}"\nname = {json.dumps(text.subject)}\n')
    for text in samples:
        character = f'character = "{text.id}"\n' if text.role == "character" else ""
        values = {name: json.dumps(getattr(text, name)) for name in ("era", "genre", "topic", "split")}
        table = "source" if text.role == "character" else "control"
        title = json.dumps(f"{text.subject}: a sketch")
        parts.append(
            _ENTRY.format(table=table, id=json.dumps(source_id(text)), character=character, title=title, **values)
        )
    return "".join(parts)


def findings(summaries: Mapping[str, Mapping], features: Path, patches: Path) -> list[str]:
    """Three sentences, honestly hedged: the autoencoder, the strongest contrast, where patching finds the difference.

    Args:
        summaries: stage -> its summary.
        features: the sealed features artifact.
        patches: the sealed patching artifact.
    """
    return [
        _sae_sentence(summaries["train"]),
        _contrast_sentence(summaries["interpret"], features),
        _patch_sentence(summaries["patch"], patches),
    ]


def _sae_sentence(train: Mapping) -> str:
    recovered = train.get("ce_loss_recovered")
    spliced = (
        f" and, put in its place, loses {1 - recovered:.0%} of what the layer is worth to the model"
        if recovered
        else ""
    )
    return (
        f"With {train['l0']:.0f} of {train['d_sae']:,} latents active a token, the autoencoder explains "
        f"{train['explained_variance']:.0%} of the variance of texts that it has not seen{spliced}; "
        f"{train['dead_fraction']:.0%} of its latents are dead. Thirty short texts are very little: a real run reads a "
        "hundred times more."
    )


def _contrast_sentence(interpret: Mapping, features: Path) -> str:
    hypotheses = interpret.get("hypotheses") or []
    if not hypotheses:
        return "No latent could be tested: there are too few subjects on either side."
    best = max(hypotheses, key=lambda row: (row["verdict"] == "supported", abs(row["effect"])))
    words = _tokens_of(features, best["latent"])
    q = f"q = {best['q_value']:.2g}" if best["q_value"] is not None else "q not available"
    supported = sum(row["verdict"] == "supported" for row in hypotheses)
    judged = (
        f"{supported} of {len(hypotheses)} candidates pass the written rules"
        if supported
        else f"none of the {len(hypotheses)} candidates passes the written rules"
    )
    beside = (
        f" On subjects that were held out it reaches AUROC {best['heldout_auroc']:.2f}, and {best['baseline']} "
        f"{best['value']:.2f}."
        if best.get("baseline") and best.get("heldout_auroc") is not None
        else ""
    )
    return (
        f"The latent that sets the characters' sketches most apart from the ordinary people's is {best['latent']} "
        f"(it fires on {words}; effect {best['effect']:+.2f}, {q}), and its verdict is '{best['verdict']}': {judged}."
        f"{beside} The unit is the subject of a text, since all thirty have one author: read it as a habit of writing about "
        "famous people, not as greatness."
    )


def _tokens_of(features: Path, latent: int) -> str:
    rows = [r for r in read_rows(features / "examples.parquet") if r["latent"] == latent][:3]
    words = dict.fromkeys(f"'{str(r['token']).strip()}'" for r in rows)
    return ", ".join(words) or "nothing that could be shown"


def _patch_sentence(patch: Mapping, patches: Path) -> str:
    """By which layer the difference has come to the place where the answer is read."""
    rows = read_rows(patches / "cells.parquet")
    last = [
        r
        for r in rows
        if r["metric"] == patch["metric"] and r["direction"] == "denoising" and r["position_from_end"] == -1
    ]
    by_layer = sorted(last, key=lambda r: r["layer"])
    here = next((r for r in by_layer if (r["normalised_effect"] or 0) >= 0.5), by_layer[-1])
    before = by_layer[0]
    p = f", family-wise p = {here['p_max_t']:.2g}" if here["p_max_t"] is not None else ""
    return (
        f"The words that tell target from baseline prompts stand before the last one; at layer {before['layer']} "
        f"restoring the last position alone brings back {max(before['normalised_effect'] or 0, 0):.0%} of the difference in "
        f"{patch['metric']}, at layer {here['layer']} {here['normalised_effect'] or 0:.0%} ({here['n_pairs']} pairs, "
        f"{patch['n_refused']} refused{p}). "
        "That says where this small model carries the difference; it does not say that the place is about greatness."
    )
