"""A random Llama with a tokenizer of its own, and a small project around it, for tests of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from greatctl import manifest
from greatctl.events import Emit, Run, silent
from greatctl.stages.context import Context, Project
from greatctl.store.artifact import Identity, work
from greatctl.store.files import sha256_bytes, write_text

TEXT = "The ship’s carpenter rose early. He mended the café door — and wrote to his son: “Courage!”\n\n"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
hf_logging.disable_progress_bar()


def save_tiny(folder: Path, *, seed: int = 0, model: type = LlamaForCausalLM, **config: Any) -> Any:
    """Save a small grouped-query model (Llama unless told) and a byte-level tokenizer; returns the model."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    kind = getattr(model, "config_class", LlamaConfig)
    if kind.model_type in ("gpt2", "gpt_neox"):  # these have no such thing, and would keep the word as if they had
        del settings["num_key_value_heads"]
    if kind.model_type == "gpt2":
        settings["n_inner"] = settings.pop("intermediate_size")
    torch.manual_seed(seed)
    hf = model(kind(**{**settings, **config})).eval()
    with torch.no_grad():  # the usual initialisation is so small that an untouched site would pass for a right one
        for parameter in hf.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    hf.save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 4, vocab_size=320, special_tokens=[BOS, EOS], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    fast.save_pretrained(folder)
    return hf


def make_project(root: Path, texts: Mapping[str, str], *, emit: Emit = silent) -> Project:
    """A project whose sources (id -> text) are fetched; `darwin-…` belong to Darwin, others are controls."""
    lines = [
        '[[character]]\nid = "darwin"\nname = "Charles Darwin"\nwhy = "a test"\n',
        '[model]\nname = "bundled"\n',
    ]
    for name in texts:
        table, who = ("source", 'character = "darwin"\n') if name.startswith("darwin") else ("control", "")
        lines.append(
            f'[[{table}]]\nid = "{name}"\nkind = "manual"\n{who}title = "{name} title"\n'
            f'author = "{name} author"\n'
            f'year = 1859\ngenre = "memoir"\ntopic = "nature"\nwhere = "a test"\n'
        )
    write_text(root / "sources.toml", "\n".join(lines))
    project = Project(root, manifest.load(root / "sources.toml"), root / "data", root / "results")
    for name, text in texts.items():
        identity = Identity("fetch", {"id": name, "sha256": sha256_bytes(text.encode())})
        with work(project.raw / name, identity) as w:
            write_text(w.path / "text.txt", text)
            w.seal({})
    return project


def context(project: Project, stage: str = "test", *, emit: Emit = silent, **more: Any) -> Context:
    """A silent context on the CPU without plugins."""
    nothing: Any = None
    return Context(project, plugins=nothing, run=Run(stage, emit), device="cpu", offline=True, **more)
