"""The base class of every architecture: four parameters, their initialisation, and what is saved.

An architecture is a small torch module that says how latents come about (`encode`) and what is minimised
(`losses`). Everything else (data, optimiser, resume, evaluation, saving) works on this class alone, so that a
plugin needs no second file. Parameters carry the names and the orientation of SAELens, which is the layout on
disk.

Random numbers: the trainer seeds torch's default generator before it builds a coder and before every step, so
a subclass may draw from it freely and stays reproducible and resumable.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

__all__ = ["Coder", "CoderConfig", "Inference"]


class CoderConfig(BaseModel):
    """Settings of an architecture. A subclass adds its own fields, each with a description and bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    d_in: int = Field(ge=1, description="width of the activations that are read")
    d_sae: int = Field(ge=1, description="number of latents")


@dataclass(frozen=True)
class Inference:
    """What is written to disk for reading latents later.

    Attributes:
        architecture: `architecture` of cfg.json.
        tensors: contiguous float32 tensors, by the names of the layout.
        extra: further top-level keys of cfg.json (`k`, say).
        details: how it was trained (`training_architecture_details`).
    """

    architecture: str
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, object] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)


class Coder(nn.Module):
    """x [n, d_in] -> latents [n, d_sae] >= 0 -> reconstruction [n, d_in].

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]. A subclass sets `name`
        and `Config`, and writes `encode` and `losses`.

    Attributes:
        unit_decoder: decoder rows are held at norm 1 (the trainer then removes the gradient along each row).
        decoder_init_norm: norm of the decoder's rows at the start.
        counts: named events worth knowing (a loss term that was not finite, say); kept in checkpoints.
    """

    name: ClassVar[str]
    Config: ClassVar[type[CoderConfig]] = CoderConfig
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    unit_decoder: bool = True
    decoder_init_norm: float = 1.0

    def __init__(self, config: CoderConfig) -> None:
        super().__init__()
        self.config = config
        rows = torch.randn(config.d_sae, config.d_in)
        rows *= self.decoder_init_norm / rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.counts: Counter[str] = Counter()
        self._fired: Tensor | None = None

    def pre_acts(self, x: Tensor) -> Tensor:
        """(x - b_dec) W_enc + b_enc, [n, d_sae]."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [n, d_sae] of x [n, d_in]."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """latents W_dec + b_dec, [n, d_in]."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x."""
        return self.decode(self.encode(x))

    def losses(self, x: Tensor, *, dead: Tensor, step: int) -> Mapping[str, Tensor]:
        """Named loss terms, already weighted; their sum is minimised.

        Call `self.note_fired(latents)` in here to spare the trainer a second encoding.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Bring the decoder's rows back to norm 1 after an optimiser step (where `unit_decoder`)."""
        if self.unit_decoder:
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def project_gradients(self) -> None:
        """Remove from each decoder row's gradient the part along the row (where `unit_decoder`).

        Without this, Adam spends its step on a length that the renormalisation takes back.
        """
        grad = self.W_dec.grad
        if self.unit_decoder and grad is not None:
            with torch.no_grad():
                grad -= (grad * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    def note_fired(self, latents: Tensor) -> None:
        """Remember which latents are active in this batch, for the dead-latent counter."""
        self._fired = (latents.detach() > 0).any(dim=0)

    def take_fired(self, x: Tensor) -> Tensor:
        """Which latents [d_sae] were active in the last batch: as noted by `losses`, else by encoding `x`
        again.
        """
        fired, self._fired = self._fired, None
        if fired is None:
            with torch.no_grad():
                fired = (self.encode(x) > 0).any(dim=0)
        return fired

    def calibrate(self, rows: Tensor) -> None:
        """Called once after training with held-out rows [n, d_in], scaled as in training: set thresholds
        here.
        """

    def fold(self, scale: float) -> None:
        """Change the parameters in place, from inputs `scale * x` to raw x.

        The pre-activations stay as they are, so whatever an architecture compares them with stays too.
        """
        with torch.no_grad():
            self.W_enc *= scale
            self.W_dec /= scale
            self.b_dec /= scale

    def folded(self, scale: float) -> Self:
        """A copy in evaluation mode that reads raw x and writes raw reconstructions, on the CPU."""
        twin = copy.deepcopy(self).cpu().eval()
        twin.fold(scale)
        return twin

    def inference_state(self) -> Inference:
        """What is saved. The default keeps every tensor under the architecture's own name, to be read by the
        same class.
        """
        return Inference(self.name, self.tensors(*self.state_dict()))

    def tensors(self, *names: str) -> dict[str, Tensor]:
        """Contiguous float32 CPU copies of the named parameters and buffers."""
        state = self.state_dict()
        return {
            n: state[n].detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format) for n in names
        }
