# ruff: noqa: E501 (the card is a page of text with figures in it)
"""The model card: every number in it is measured here, on the finished folder as a user would load it.

Writes README.md for people and card.json for programs into the model folder. A card that the build program
writes itself cannot drift from the model beside it.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from greatctl.reference import PAIR_SETS, pairs_path
from greatctl.reference.bpe import encode, load_tokenizer
from greatctl.reference.score import (
    Trigram,
    bits_per_byte,
    copying,
    head_scores,
    pair_differences,
    trigram_bits_per_byte,
)

MARGIN = 0.5  # how much more a clean prompt must favour the answer for a pair to count as told apart
RECIPE = "recipe.json"


def write_card(folder: Path, train: dict[str, str], heldout: dict[str, str]) -> dict[str, Any]:
    """Judge the model in `folder` and write README.md and card.json; returns what card.json holds."""
    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    numbers = measure(folder, train, heldout, recipe["recipe"]["context"])
    (folder / "card.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_page(numbers, recipe), encoding="utf-8")
    return numbers


def measure(folder: Path, train: dict[str, str], heldout: dict[str, str], context: int) -> dict[str, Any]:
    """Size, held-out compression beside the trigram's, copying, its heads, and the bundled pairs."""
    tokenizer = load_tokenizer(folder)
    # bf16 as stored, computed in float32: slower processors have no bf16 products.
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    bos, size = tokenizer.bos_token_id, len(tokenizer)
    documents = [encode(tokenizer, text) for text in train.values()]
    trigram = Trigram(np.concatenate(documents), size)
    works = {}
    for name, text in heldout.items():
        ids, n_bytes = encode(tokenizer, text), len(text.encode())
        works[name] = {
            "bytes": n_bytes,
            "tokens": len(ids),
            "bits_per_byte": round(bits_per_byte(model, ids, n_bytes, bos, context), 4),
            "trigram_bits_per_byte": round(trigram_bits_per_byte(trigram, ids, n_bytes, bos), 4),
        }
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.suffix in {".safetensors", ".json"}),
        "train": {"documents": len(documents), "bytes": sum(len(t.encode()) for t in train.values()),
                  "tokens": sum(map(len, documents)), "names": sorted(train)},
        "heldout": works,
        "heldout_total": _total(works),
        "copying": copying(model, size, bos, period=min(100, context // 2 - 1)),
        "heads": _heads(model, size, bos, period=min(60, context // 2 - 1)),
        "pairs": {name: _pairs(model, tokenizer, name) for name in PAIR_SETS if pairs_path(name).exists()},
    }  # fmt: skip


def _total(works: dict[str, dict[str, float]]) -> dict[str, float]:
    """Both figures over all held-out works together, weighted by their bytes."""
    n_bytes = sum(work["bytes"] for work in works.values())
    keys = ("bits_per_byte", "trigram_bits_per_byte")
    return {key: round(sum(w[key] * w["bytes"] for w in works.values()) / n_bytes, 4) for key in keys if n_bytes}


def _heads(model: Any, vocab_size: int, bos: int, period: int) -> dict[str, list[dict[str, Any]]]:
    """The four strongest heads of each kind, named layer.head, with their mean attention."""
    result = {}
    for kind, scores in head_scores(model, vocab_size, bos, period=period).items():
        values, places = scores.flatten().topk(min(4, scores.numel()))
        n_heads = scores.shape[1]
        result[kind] = [
            {"head": f"{place // n_heads}.{place % n_heads}", "score": round(value, 3)}
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]
    return result


def _pairs(model: Any, tokenizer: Any, name: str) -> dict[str, int]:
    """How many bundled pairs fit the tokenizer, and how many the model tells apart by the margin."""
    pairs = tomllib.loads(pairs_path(name).read_text(encoding="utf-8"))["pair"]
    differences = pair_differences(model, tokenizer, pairs)
    return {
        "pairs": len(pairs),
        "fit": sum(difference is not None for difference in differences),
        "told_apart": sum(difference is not None and difference >= MARGIN for difference in differences),
    }


def _page(numbers: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The card for people, in Markdown."""
    train, settings = numbers["train"], recipe["recipe"]
    works = "".join(
        f"| {name} | {w['bytes']:,} | {w['bits_per_byte']:.3f} | {w['trigram_bits_per_byte']:.3f} |\n"
        for name, w in numbers["heldout"].items()
    )
    total = numbers["heldout_total"]
    if total:
        works += f"| together | | {total['bits_per_byte']:.3f} | {total['trigram_bits_per_byte']:.3f} |\n"
    heads = {k: ", ".join(f"{h['head']} ({h['score']:.2f})" for h in v) for k, v in numbers["heads"].items()}
    pairs = "".join(
        f"| {name} | {p['pairs']} | {p['fit']} | {p['told_apart']} |\n" for name, p in numbers["pairs"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    return f"""# The bundled reference model

A language model of {numbers["parameters"]:,} parameters in the Llama architecture, {numbers["bytes"] / 1e6:.1f} MB with its tokenizer (weights in bf16). It is
small enough to live in a Python package and has really read books, so that tools for interpretability can be tried, tested
and demonstrated without access to a large model. `greatctl.reference.build` made it and wrote this page.

## Data

{train["documents"]} plain texts, {train["bytes"]:,} bytes, {train["tokens"]:,} tokens of its own byte-level BPE ({settings["vocab_size"]:,} entries, Llama 3's splitting
pattern): {", ".join(train["names"])}. (Files called pgN.txt are Project Gutenberg's books of that number: in the public domain
in the United States, freed of the wrapper, one paragraph a line.) Never seen: {", ".join(numbers["heldout"]) or "nothing was held out"}.

## Recipe

{settings["n_layers"]} layers, d_model {settings["d_model"]}, {settings["n_heads"]} heads on {settings["n_kv_heads"]} key-value heads, MLP {settings["d_mlp"]}, context {settings["context"]}, RMSNorm, RoPE, tied embeddings.
{settings["epochs"]:g} epochs in batches of {settings["batch_size"]} windows; Muon ({settings["matrix_lr"]:g}) for matrices, AdamW ({settings["lr"]:g}) for the rest, linearly to zero; weight
decay {settings["weight_decay"]:g}, dropout {settings["dropout"]:g} on every addition to the residual stream, seed {settings["seed"]}; trained on {recipe["device"]} with {versions}.
Every window starts with the beginning-of-text token, and half of them at a paragraph. **{settings["copy_fraction"]:.0%} of the windows are random
tokens repeated**, because books alone teach a model of this size no copying: the copying below was taught on purpose.
The weights kept are those with the lowest held-out figure of this run. {recipe["note"]}

## Held-out text, bits per byte (lower is better)

Windows of {settings["context"]} tokens that do not overlap. The trigram is interpolated Kneser-Ney on the same tokens.

| work | bytes | model | trigram |
|---|--:|--:|--:|
{works}
## Copying

Uniformly random tokens given twice: {numbers["copying"]:.3f} of the second copy is guessed right. Heads are named layer.head, from 0, with their
mean attention on such text.

* previous token: {heads["previous_token"]}
* induction: {heads["induction"]}

## Bundled pairs

A pair is told apart when the clean prompt favours the answer over the wrong answer by at least {MARGIN} (in logits) more than the
corrupted prompt does. The pairs were written for this model and screened on it: this describes the set, and is no evidence
that the model understands the concepts.

| set | pairs | fit the tokenizer | told apart |
|---|--:|--:|--:|
{pairs}
## What it cannot do

It knows the prose of its books, mostly of 1650 to 1930 and in English, with their opinions and prejudices. It follows grammar and topic
for a sentence or two, and then wanders. It does not answer questions, follow instructions, reason, count or know facts. A latent found in it
is a finding about this model; whether a larger one has it must be looked at there.
"""
