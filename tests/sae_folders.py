"""Coders away from their initialisation, and SAELens folders written by hand, for the tests of reading and writing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from greatctl.sae.batchtopk import BatchTopK
from greatctl.sae.coder import Coder
from greatctl.sae.folder import Origin
from greatctl.sae.gated import Gated
from greatctl.sae.jumprelu import JumpRelu
from greatctl.sae.matryoshka import Matryoshka
from greatctl.sae.relu import Relu
from greatctl.sae.skip_transcoder import SkipTranscoder
from greatctl.sae.topk import TopK
from greatctl.sae.transcoder import Transcoder

D_IN, D_SAE, D_OUT = 12, 40, 9
ORIGIN = Origin("toy", "blocks.1.hook_resid_mid", 17)
BOTH = Origin("toy", "blocks.1.hook_resid_mid", 17, target_hook_point="blocks.1.hook_mlp_out")
ARCHITECTURES: dict[str, tuple[type[Coder], dict, str]] = {  # class, options, architecture on disk
    "relu": (Relu, {}, "standard"),
    "gated": (Gated, {}, "gated"),
    "topk": (TopK, {"k": 4}, "topk"),
    "batchtopk": (BatchTopK, {"k": 4}, "jumprelu"),
    "jumprelu": (JumpRelu, {"k": 4}, "jumprelu"),
    "matryoshka": (Matryoshka, {"k": 4}, "jumprelu"),
    "transcoder": (Transcoder, {"k": 4, "d_out": D_OUT}, "jumprelu_transcoder"),
    "skip-transcoder": (SkipTranscoder, {"k": 4, "d_out": D_OUT}, "jumprelu_skip_transcoder"),
}
FOREIGN: dict[str, dict] = {  # folders that greatctl reads and does not write: cfg.json beyond the common keys
    "standard": {"apply_b_dec_to_input": False},
    "topk": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"apply_b_dec_to_input": False, "dtype": "bfloat16"},
    "transcoder": {"apply_b_dec_to_input": False, "d_out": D_OUT},
    "skip_transcoder": {"apply_b_dec_to_input": False, "d_out": D_OUT},
}


def coder_of(name: str) -> Coder:
    """A coder of an architecture in which nothing is accidentally zero or tied; thresholds are set."""
    cls, options, _ = ARCHITECTURES[name]
    torch.manual_seed(3)
    coder = cls(cls.Config(d_in=D_IN, d_sae=D_SAE, **options))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        if isinstance(coder, JumpRelu):
            coder.log_threshold += 0.3 * torch.randn(D_SAE)
    coder.after_step()
    coder.calibrate(rows(500, seed=1))
    return coder


def rows(n: int = 200, *, seed: int = 5) -> Tensor:
    """[n, D_IN]."""
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def foreign(folder: Path, architecture: str) -> dict[str, Tensor]:
    """Write a folder as SAELens might; returns its tensors as float32."""
    more = FOREIGN[architecture]
    g = torch.Generator().manual_seed(8)
    d_out = more.get("d_out", D_IN)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,)}
    shapes |= {"W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    shapes |= {"threshold": (D_SAE,)} if architecture == "jumprelu" else {}
    shapes |= {"W_skip": (d_out, D_IN)} if architecture == "skip_transcoder" else {}
    tensors = {name: 0.5 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if more.get("dtype") == "bfloat16":
        tensors = {name: t if name == "threshold" else t.bfloat16() for name, t in tensors.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_mlp_in"},
        **more,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return {name: tensor.float() for name, tensor in tensors.items()}
