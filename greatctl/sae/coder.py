"""The base class of every architecture: four parameters, their initialisation, and what is saved.

An architecture is a small torch module that says how latents come about (`encode`) and what is minimised
(`losses`). Everything else (data, optimiser, resume, evaluation, saving) works on this class alone, so that a
plugin needs no second file. Parameters carry the names and the orientation of SAELens, which is the layout on
disk.

Random numbers: the trainer seeds torch's default generator before it builds a coder and before every step, so
a subclass may draw from it freely and stays reproducible and resumable.

A batch that does not fit the memory comes in parts, and must give what it would have given whole: the trainer
weights the terms of each part by its share of the rows and adds the gradients up. That is exact where every term is
a mean over rows (`separable`). Where a term looks across the batch (a threshold of the batch, the variance of its
residual), `prepare` is asked first, and `losses` of each part gets its answer as `shared`.

A transcoder (`reads_target`) writes not what it read but another site's activations: its `losses` get `target`,
and W_dec, b_dec and the reconstruction have width d_out.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

__all__ = ["Coder", "CoderConfig", "Inference", "k_fits"]

_Config = TypeVar("_Config", bound="CoderConfig")


class CoderConfig(BaseModel):
    """Settings of an architecture. A subclass adds its own fields, each with a description and bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    d_in: int = Field(ge=1, description="width of the activations that are read")
    d_sae: int = Field(ge=1, description="number of latents")


def k_fits(config: _Config) -> _Config:
    """A validator for configs with a field `k`, None or a number of latents: more cannot be active than there are."""
    k = getattr(config, "k", None)
    if k is not None and k > config.d_sae:
        raise ValueError(f"k = {k} is above d_sae = {config.d_sae}")
    return config


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
    """x [n, d_in] -> latents [n, d_sae] >= 0 -> reconstruction [n, d_out]; d_out = d_in but for transcoders.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]. A subclass sets `name`
        and `Config`, and writes `encode` and `losses`.

    Attributes:
        reads_target: `losses` takes `target` [n, d_out] (a transcoder); Config then has a field `d_out`.
        separable: each loss term is a mean over rows. False: `losses` takes `shared`, what `prepare` gave.
        unit_decoder: decoder rows are held at norm 1 (the trainer then removes the gradient along each row).
        frozen_decoder: W_dec stays as it was drawn (a control).
        decoder_init_norm: norm of the decoder's rows at the start.
        counts: named events worth knowing (a loss term that was not finite, say); kept in checkpoints.
    """

    name: ClassVar[str]
    Config: ClassVar[type[CoderConfig]] = CoderConfig
    reads_target: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    unit_decoder: bool = True
    frozen_decoder: bool = False
    decoder_init_norm: float = 1.0

    def __init__(self, config: CoderConfig) -> None:
        super().__init__()
        self.config = config
        rows = torch.randn(config.d_sae, self.d_out)
        rows *= self.decoder_init_norm / rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.counts: Counter[str] = Counter()
        self._fired: Tensor | None = None

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return int(getattr(self.config, "d_out", None) or self.config.d_in)

    def start(self, mean: Tensor, target_mean: Tensor | None = None) -> None:
        """Called once before training with the mean of the rows [d_in] (and of the targets [d_out]), scaled as the
        rows are: b_dec starts there, so that latents need not spend themselves on the mean.
        """
        with torch.no_grad():
            self.b_dec.copy_(mean)

    def pre_acts(self, x: Tensor) -> Tensor:
        """(x - b_dec) W_enc + b_enc, [n, d_sae]."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [n, d_sae] of x [n, d_in]."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """latents W_dec + b_dec, [n, d_out]."""
        return latents @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the coder makes of x, [n, d_out]: the one public way, since a decoder may look at x as well."""
        return self.decode(self.encode(x))

    def forward(self, x: Tensor) -> Tensor:
        """As `reconstruct`."""
        return self.reconstruct(x)

    def losses(self, x: Tensor, *, dead: Tensor, step: int) -> Mapping[str, Tensor]:
        """Named loss terms, already weighted; their sum is minimised.

        Call `self.note_fired(latents)` in here to spare the trainer a second encoding. With `reads_target` there is a
        keyword `target` [n, d_out] besides, and without `separable` a keyword `shared` (None: x is the whole batch).
        """
        raise NotImplementedError

    def prepare(self, parts: Sequence[Tensor], *, dead: Tensor, targets: Sequence[Tensor] | None = None) -> object:
        """What `losses` has to know of the whole batch when it is given in these parts (its `shared`).

        Called without gradients, and only where `separable` is False; the parts' losses, weighted by their shares of
        the rows, then add up to those of the whole batch.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Once after each optimiser step: bring the decoder's rows back to norm 1 (where `unit_decoder`), and
        `settle`.
        """
        if self.unit_decoder and not self.frozen_decoder:
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.settle()

    def settle(self) -> None:
        """What else follows an optimiser step (a threshold that follows the batches, say)."""

    def project_gradients(self) -> None:
        """Remove from each decoder row's gradient the part along the row (where `unit_decoder`), or all of it
        (`frozen_decoder`).

        Without this, Adam spends its step on a length that the renormalisation takes back.
        """
        grad = self.W_dec.grad
        if self.frozen_decoder:
            self.W_dec.grad = None
        elif self.unit_decoder and grad is not None:
            with torch.no_grad():
                grad -= (grad * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    def note_fired(self, latents: Tensor) -> None:
        """Remember which latents are active, for the dead-latent counter; the parts of a batch add up."""
        fired = (latents.detach() > 0).any(dim=0)
        self._fired = fired if self._fired is None else self._fired | fired

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
        """Change the parameters in place, from inputs `scale * x` to raw x. With `reads_target` there is a second
        argument, `target_scale`: the targets were `target_scale * y`, and raw y is wanted.

        The pre-activations stay as they are, so whatever an architecture compares them with stays too.
        """
        with torch.no_grad():
            self.W_enc *= scale
            self.W_dec /= scale
            self.b_dec /= scale

    def folded(self, scale: float, target_scale: float = 1.0) -> Self:
        """A copy in evaluation mode that reads raw x and writes raw reconstructions, on the CPU."""
        twin = copy.deepcopy(self).cpu().eval()
        twin._fired = None
        if self.reads_target:
            twin.fold(scale, target_scale)  # type: ignore[call-arg]
        else:
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
