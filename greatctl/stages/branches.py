"""Runs that leave a text's own run at an SAE's hook point, and the unrelated text that they are priced on.

What steering, and the causal half of the evidence, have in common: one run of the texts as they are, from whose
stored activation any number of changed runs go on, so that the blocks below run once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..features.steering import SparseCode
from ..model.interface import FrozenModel, Intervention, Site, Start
from ..model.tokenizer import encode

if TYPE_CHECKING:
    from ..corpus.windows import TokenStore
    from ..sae.folder import LoadedSAE

__all__ = ["Branch", "Price", "fitting", "held_out_windows", "unrelated_windows"]

WINDOWS, WIDTH = 4, 64
_LOGITS = 2**25  # logits held at once


def fitting(model: FrozenModel, sae: LoadedSAE) -> str:
    """The hook point that `sae` reads and writes.

    Raises:
        InputError: it names none, it writes elsewhere (a transcoder), or the model is another one.
    """
    why = ""
    if sae.hook_point is None:
        why = "its cfg.json does not say where it reads"
    elif sae.target_hook_point not in (None, sae.hook_point):
        why = f"it reads {sae.hook_point} and writes {sae.target_hook_point}: what it writes is not what it read"
    elif Site.parse(sae.hook_point).layer >= model.n_layers:
        why = f"it reads {sae.hook_point}, and {model.name} has {model.n_layers} blocks"
    elif Site.parse(sae.hook_point).is_residual and sae.d_in != model.d_model:
        why = f"it reads {sae.d_in} numbers, and the residual stream of {model.name} has {model.d_model}"
    if why or sae.hook_point is None:
        fix = "name an autoencoder of this model with --sae"
        raise InputError(f"the latents of {sae.name} cannot be changed in {model.name}", why=why, fix=fix)
    return sae.hook_point


class Branch:
    """Some texts, run as they are up to the hook point, and then on with other activations there.

    Args:
        model: the frozen model.
        hook_point: where activations are changed.
        tokens: [n, p] ids, right-padded.
        real: bool [n, p], False on padding; None: there is none.

    Attributes:
        value: [n, p, d], the activations there.
        where: bool [n, p], real tokens that are no special ones: where an SAE has a say.
    """

    def __init__(self, model: FrozenModel, hook_point: str, tokens: Tensor, real: Tensor | None = None) -> None:
        self._model, self._hook_point, self._site = model, hook_point, Site.parse(hook_point)
        self.tokens = tokens.to(model.device, torch.long)
        special = torch.tensor(list(model.special_ids), device=model.device)
        ordinary = ~torch.isin(self.tokens, special)
        self.where = ordinary if real is None else ordinary & real.to(model.device)
        pre = f"blocks.{self._site.layer}.hook_resid_pre"
        found = model.capture(self.tokens, list(dict.fromkeys([pre, hook_point])))
        self._pre, self._shape = found[pre], found[hook_point].shape[2:]
        self.value = found[hook_point].flatten(2)

    @cached_property
    def norm(self) -> float:
        """Mean norm of the activations."""
        return float(self.value[self.where].float().norm(dim=-1).mean())

    @torch.no_grad()
    def logits(self, rows: Tensor, changed: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [m, p, V], or [m, V] at positions [m], of the texts `rows` [m] with `changed` [m, p, d] there."""
        layer, kind = self._site.layer, self._site.kind
        if kind in ("hook_resid_pre", "hook_resid_post"):
            layer += kind == "hook_resid_post"
            if positions is not None and self._model.reuses_prefix and layer < self._model.n_layers:
                return self._model.climb([Start(layer, changed)], positions=positions)  # spares the last MLP elsewhere
            return self._model.resume(layer, changed, positions=positions)

        def put(value: Tensor) -> Tensor:
            return changed.unflatten(2, self._shape).to(value.dtype)

        return self._model.resume(layer, self._pre[rows], [Intervention(self._hook_point, put)], positions=positions)

    def acts(self, sae: SparseCode) -> Iterator[Tensor]:
        """Latent activations [p, d_sae] of one text after the other, 0 where the SAE has no say."""
        for value, where in zip(self.value, self.where, strict=True):
            yield sae.encode(value.float()) * where[:, None]


class Price:
    """What changes cost on unrelated text.

    Args:
        branch: windows of unrelated text.
    """

    def __init__(self, branch: Branch) -> None:
        self._branch = branch
        self._next = branch.tokens[:, 1:]
        everyone = torch.arange(len(branch.tokens), device=branch.tokens.device)
        self._before = torch.cat([self._log_probs(i, branch.value[i]) for i in everyone.split(1)])
        self._shares = self._before.exp()
        self._nats = -self._of_next(self._before, everyone).double().mean(dim=1)

    @property
    def nats(self) -> float:
        """Cross-entropy of the untouched model, nats a token."""
        return float(self._nats.mean())

    @property
    def together(self) -> int:
        """Windows whose logits are held at once."""
        _, positions, d_vocab = self._before.shape
        return max(1, _LOGITS // ((positions + 1) * d_vocab))

    def of(self, rows: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """(KL(before || after), rise of the cross-entropy), nats a token, float64 [m] each.

        Args:
            rows: numbers of the windows [m].
            changed: their activations [m, q, d].
        """
        after = self._log_probs(rows, changed)
        nats = -self._of_next(after, rows).double().mean(dim=1)
        kl = (self._shares[rows] * (self._before[rows] - after)).sum(-1).double().mean(dim=1)
        return kl.cpu(), (nats - self._nats[rows]).cpu()

    def _log_probs(self, rows: Tensor, changed: Tensor) -> Tensor:
        return self._branch.logits(rows, changed)[:, :-1].float().log_softmax(-1)

    def _of_next(self, log_probs: Tensor, rows: Tensor) -> Tensor:
        return log_probs.gather(-1, self._next[rows][..., None])[..., 0]


def unrelated_windows(model: FrozenModel, n: int = WINDOWS, width: int = WIDTH) -> Tensor:
    """Windows [n, width] of text about ordinary people that comes with greatctl, under this model's tokenizer."""
    from ..reference import texts

    chosen = [t for t in texts() if t.role == "control" and t.split != "train"][:n]
    width = min(width, model.n_ctx)
    return torch.tensor([encode(model.tokenizer, t.path.read_text(encoding="utf-8"))[:width] for t in chosen])


def held_out_windows(
    store: TokenStore, n: int = WINDOWS, width: int = WIDTH, *, n_ctx: int | None = None
) -> Tensor | None:
    """`n` windows [n, width] of controls (held out where any are), evenly spaced; None where too few are that long.

    Args:
        n_ctx: the model's context, which no window exceeds.
    """
    documents, owner = store.documents, store.windows["document"]
    width = min(width, store.window, n_ctx or width)
    long = (store.length >= width).nonzero().flatten().tolist()
    controls = [i for i in long if documents[owner[i]].get("role") != "character"]
    apart = [i for i in controls if documents[owner[i]].get("split") not in (None, "", "train")]
    chosen = apart or controls
    if len(chosen) < n:
        return None
    return store.input_ids[torch.tensor(chosen)[:: len(chosen) // n][:n], :width].long()
