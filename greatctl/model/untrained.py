"""A model of the same shape that has learnt nothing: the control for whatever is claimed about a trained one.

Sparse autoencoders find latents that explain well, and that read like meanings, in random transformers too
(2501.17727); so what an SAE finds in the trained model is worth the difference.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .loading import describe, locate, quiet

__all__ = ["write_untrained"]

_BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")


def write_untrained(
    source: str | Path, folder: Path, *, layers: int, seed: int, device: str = "cpu", offline: bool = False
) -> None:
    """Write a model folder with the configuration and tokenizer of `source` and freshly drawn weights.

    Args:
        layers: blocks to keep, from the bottom: no more than are read.
        seed: of the weights; the same seed, device kind and versions give the same weights.
        device: where they are drawn (drawing billions of numbers on a CPU takes minutes).

    Raises: as `locate`; the weights of `source` are never needed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    located = locate(source, offline=offline)
    config = AutoConfig.from_pretrained(str(located.folder), local_files_only=True)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    dtype = getattr(torch, describe(source, offline=offline).dtype)
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with quiet():
        hf.save_pretrained(str(folder), safe_serialization=True)
    for pattern in _BESIDE:
        for path in located.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
