"""The hot engine: a Hugging Face decoder, walked block by block.

Llama, Mistral, Qwen 2 and 3 and GPT-2 compute in every block

    mid  = pre + attention(norm(pre))
    post = mid + mlp(norm(mid))

so instead of hanging hooks on it, this engine writes those two lines itself with the model's own modules.
Every site is then a plain local tensor: capturing is keeping it, editing is replacing it, stopping is not
going on, resuming is starting in the middle. A block that nobody looks into runs its own attention and MLP;
only a block with a touched inner site, or one resumed behind a prefix, has its attention written out.
`check` holds the walk against the model's own forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..errors import StageError, UsageError
from .attention import Prefix, attend, causal_mask
from .exact import KINDS, exact
from .families import Rotary, Rotation, family_of, heads_of
from .fast import FastBlocks, why_not
from .inputs import fork, forked_qkv, forks, head_outputs, head_values
from .interface import HEAD_SITES, INPUT_SITES, Intervention, Site, Start, site_names, unknown_site
from .looks import Edit, Enough, Keep, Look, in_rows
from .oracle import ROW_TOLERANCE, agree, listen, row_difference
from .past import Past, behind

if TYPE_CHECKING:
    from .interface import Streams
    from .loading import ModelInfo

__all__ = ["LeanModel"]

_AS_GOOD = 1.25  # how much further from float32 than the plain walk a faster one may be


class LeanModel:
    """`FrozenModel` over a Hugging Face model of the lean families; see the interface for the contract.

    Args:
        hf: a `…ForCausalLM`, or the bare decoder (`LlamaModel`) where only captures are needed; it
            may hold fewer blocks than the whole model, and its blocks may lie on several devices.
        info: facts of the whole model.
        tokenizer: its Hugging Face tokenizer.
        special_ids: ids that are no text.
    """

    engine = "lean"
    reuses_prefix = True

    def __init__(self, hf: Any, info: ModelInfo, tokenizer: Any, special_ids: Sequence[int]) -> None:
        self.name, self.revision = info.name, info.revision
        self.n_layers, self.d_model, self.d_vocab, self.n_ctx = (
            info.n_layers,
            info.d_model,
            info.d_vocab,
            info.n_ctx,
        )
        self.tokenizer, self.special_ids = tokenizer, list(special_ids)
        hf.eval().requires_grad_(False)
        if hf.config._attn_implementation != "sdpa":  # without a mask, eager attention would see the future
            hf.set_attn_implementation("sdpa")
        self._head = getattr(hf, "lm_head", None)
        self._decoder = getattr(hf, hf.base_model_prefix) if self._head is not None else hf
        self._family = family_of(self._decoder)
        self._heads = heads_of(hf.config)
        self.n_heads, self.n_kv_heads, self.d_head, self.d_mlp = self._heads
        self._window = getattr(hf.config, "sliding_window", None)
        self._loaded = len(self._family.layers)
        self._fused: FastBlocks | None = None
        self._fast: FastBlocks | None = None  # `_fused`, once it was found to agree
        self._homes = [_home(block) for block in self._family.layers]
        embedding = self._decoder.get_input_embeddings()
        self.device, self.dtype = _home(embedding), embedding.weight.dtype

    def sites(self) -> list[str]:
        """Sites of the loaded blocks."""
        return site_names(self._loaded)

    def capture(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations at `sites`; see `FrozenModel.capture`."""
        return self._capture(tokens, sites, None)

    def capture_all(self, tokens: torch.Tensor, sites: Sequence[str]) -> tuple[dict[str, torch.Tensor], Past]:
        """Activations at `sites` and the past of all loaded blocks; see `FrozenModel.capture_all`."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        values = self._capture(tokens, sites, kept)
        return values, Past([key for key, _ in kept], [value for _, value in kept])

    def past(self, tokens: torch.Tensor) -> Past:
        """Keys and values of all loaded blocks; see `FrozenModel.past`."""
        return self.capture_all(tokens, ())[1]

    def run(
        self,
        tokens: torch.Tensor,
        interventions: Sequence[Intervention] = (),
        *,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits under interventions; see `FrozenModel.run`."""
        return self._finish(0, self._embed(tokens), interventions, positions)

    def resume(
        self,
        layer: int,
        residual: torch.Tensor,
        interventions: Sequence[Intervention] = (),
        *,
        positions: torch.Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
    ) -> torch.Tensor:
        """Logits from the residual entering block `layer`; see `FrozenModel.resume`."""
        if not 0 <= layer <= self.n_layers:
            raise UsageError(f"layer {layer} is out of range", why=f"the model has layers 0 to {self.n_layers - 1}")
        positions = behind(start, past, len(residual), positions)
        residual = residual.to(self.device, self.dtype)
        if any(i.site == f"blocks.{layer}.hook_resid_pre" for i in interventions):
            residual = residual.clone()  # an edit may write in place, but not into what the caller holds
        return self._finish(layer, residual, interventions, positions, start=start, past=past)

    def climb(
        self,
        starts: Sequence[Start],
        *,
        positions: torch.Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
    ) -> torch.Tensor:
        """Logits of runs that join one walk at their own blocks; see `FrozenModel.climb`."""
        layers = [s.layer for s in starts]
        if not layers or layers != sorted(layers) or layers[0] < 0 or layers[-1] >= self.n_layers:
            raise UsageError(f"runs cannot begin at the layers {layers}", why=f"of 0 to {self.n_layers - 1}, in order")
        ends = list(accumulate(len(s.residual) for s in starts))
        positions = behind(start, past, ends[-1], positions)
        edit = self._editing(
            Intervention(i.site, partial(in_rows, i.edit, end - len(s.residual), end))
            for s, end in zip(starts, ends, strict=True)
            for i in s.interventions
        )
        hidden = starts[0].residual[:0].to(self.device, self.dtype)
        index = torch.arange(ends[-1], device=self.device)
        for s, end, last in zip(starts, ends, [*layers[1:], self.n_layers], strict=True):
            joining = s.residual.to(hidden.device, self.dtype)
            here = past.rows(index[:end]) if past is not None and start else None
            some = positions if last == self.n_layers and edit.ends_with_attention(self.n_layers - 1) else None
            hidden = self._walk(
                torch.cat([hidden, joining]), s.layer, edit, start=start, past=here, last=last, only=some
            )
        if positions is not None and hidden.shape[1] == 1:
            positions = torch.zeros_like(positions)
        return self._unembed(hidden, edit, positions, layers[0])

    def head_outputs(self, layer: int, z: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """What each head adds to the stream; see `FrozenModel.head_outputs`."""
        return head_outputs(self._family, layer, z.to(self._homes[layer]), heads).to(self.device)

    @torch.no_grad()
    def head_values(
        self, layer: int, streams: Streams, heads: Sequence[int], *, start: int = 0, past: Past | None = None
    ) -> torch.Tensor:
        """z of heads whose projections read streams of their own; see `FrozenModel.head_values`."""
        q, k, v = (each.to(self._homes[layer], self.dtype) for each in streams)
        like = q[:, :, 0]
        rotation = self._family.rotation(like, torch.arange(start, start + like.shape[1], device=like.device))
        mask = self._mask(layer, start, like, explicit=False)
        prefix = Prefix(*past.layer(layer, start)) if past is not None and start else None
        return head_values(self._family, layer, (q, k, v), heads, rotation, mask, prefix).to(self.device)

    @torch.no_grad()
    def mlp_values(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """What the MLP of a block adds; see `FrozenModel.mlp_values`."""
        _, _, norm, mlp = self._family.parts(self._family.layers[layer])
        return mlp(norm(stream.to(self._homes[layer], self.dtype))).to(self.device)

    def check(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, float]:
        """Hold the walk against the model's own forward; see `FrozenModel.check`."""
        truth = listen(self._family, self._heads, tokens.to(self.device), sites)
        return agree(self.capture(tokens, sites), truth, self.dtype)

    @torch.no_grad()
    def accelerate(self, tokens: torch.Tensor, sites: Sequence[str], *, compiled: bool = False) -> str | None:
        """Fuse the blocks' projections, and compile the blocks for the shape of `tokens`, for all later passes.

        First both ways of capturing `sites` on tokens [b, p] are compared. Blocks that are looked into, resumed
        behind a prefix or narrowed by a sliding window stay as they are.

        Returns:
            None, or why nothing was changed: the family has no fused form, the compiler failed, or the results differ.
        """
        reason = why_not(self._family)
        if reason is not None:
            return reason
        assert isinstance(self._family, Rotary)
        self._fast = None
        plain = self.capture(tokens, sites)
        blocks = self._fused = self._fused or FastBlocks(self._family, self._heads)
        try:
            self._fast = blocks
            blocks.compile_for((*tokens.shape, self.d_model) if compiled else None)
            fast = self.capture(tokens, sites)
        except torch.OutOfMemoryError:
            self._fast = None
            raise
        except Exception as error:  # whatever the compiler stumbles over, the plain walk does the same work
            self._fast = None
            return f"the compiler failed ({type(error).__name__})"
        apart = max(row_difference(fast[site], plain[site]) for site in sites)
        if not apart <= ROW_TOLERANCE[self.dtype] and not self._as_exact(tokens[:2], sites, fast, plain):
            self._fast = None
            return f"its rows would differ by {apart:.1e} from the plain ones"
        return None

    def _as_exact(
        self, tokens: torch.Tensor, sites: Sequence[str], fast: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]
    ) -> bool:
        """Whether the fast rows are as near to float32 as the plain ones: two ways of rounding, and neither wrong."""
        assert isinstance(self._family, Rotary)
        causal = self._window is None or tokens.shape[1] <= self._window
        if ROW_TOLERANCE[self.dtype] < 1e-3 or not causal or any(Site.parse(s).kind not in KINDS for s in sites):
            return False
        truth = exact(self._family, self._homes, tokens.to(self.device), sites)
        n = len(tokens)
        return all(
            row_difference(fast[site][:n], truth[site]) <= _AS_GOOD * row_difference(plain[site][:n], truth[site])
            for site in sites
        )

    def _known(self, sites: Iterable[str]) -> list[str]:
        sites, known = list(sites), self.sites()
        among = {*known, *site_names(self._loaded, INPUT_SITES)}
        for name in sites:
            if name not in among:
                raise unknown_site(name, known)
        return sites

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.ndim != 2 or tokens.shape[1] > self.n_ctx:
            why = f"the model reads [batch, position] with at most {self.n_ctx} positions"
            raise UsageError(f"tokens of shape {list(tokens.shape)} cannot be read", why=why)
        return self._family.embed(tokens.to(self.device))

    @torch.no_grad()
    def _capture(
        self, tokens: torch.Tensor, sites: Sequence[str], kept: list[tuple[torch.Tensor, torch.Tensor]] | None
    ) -> dict[str, torch.Tensor]:
        """Activations at `sites`; with `kept`, all blocks run and leave their keys and values there."""
        keep = Keep(self._known(sites), self.device, stops=kept is None)
        if keep.names or kept is not None:
            with suppress(Enough):
                self._walk(self._embed(tokens), 0, keep, kept=kept)
        return {name: keep.found[name] for name in sites}

    def _walk(
        self,
        hidden: torch.Tensor,
        first: int,
        look: Look,
        *,
        start: int = 0,
        past: Past | None = None,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        last: int | None = None,
        only: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Blocks `first` onwards (and before `last`) on hidden [b, q, d], whose first position is `start`.

        With `only` [b] (counted from `start`) the result is [b, 1, d]: behind the last attention nothing else counts.
        `look` maps a site's tensor to the next one; `kept` collects keys and values.
        """
        where = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        rotation = self._family.rotation(hidden, where)
        for layer in range(first, self._loaded if last is None else last):
            home = self._homes[layer]
            if hidden.device != home:
                hidden = hidden.to(home)
                rotation = None if rotation is None else (rotation[0].to(home), rotation[1].to(home))
            if self._takes_fast(layer, hidden, look, start, kept):
                assert self._fast is not None
                hidden = self._fast(layer, look.at(layer, "hook_resid_pre", hidden), rotation)
                hidden = look.at(layer, "hook_resid_post", hidden)
                continue
            block = self._family.layers[layer]
            norm1, _, norm2, _ = self._family.parts(block)
            pre = look.at(layer, "hook_resid_pre", hidden)
            attended = self._attended(layer, norm1(pre), rotation, look, start, past, kept, pre)
            mid = look.at(layer, "hook_resid_mid", pre + look.at(layer, "hook_attn_out", attended))
            if only is not None and layer == self.n_layers - 1:
                mid = mid[torch.arange(len(mid), device=home), only.to(home)].unsqueeze(1)
            added = look.at(layer, "hook_mlp_out", self._mlp(layer, norm2(fork(look, layer, mid)), look))
            hidden = look.at(layer, "hook_resid_post", mid + added)
        return hidden

    def _takes_fast(self, layer: int, hidden: torch.Tensor, look: Look, start: int, kept: list[Any] | None) -> bool:
        """Whether a block may run fused: nobody looks inside, and it is plainly causal from position 0."""
        if self._fast is None or start or kept is not None or layer in look.inside or torch.is_grad_enabled():
            return False
        return self._mask(layer, 0, hidden, explicit=False) is None

    def _attended(
        self,
        layer: int,
        x: torch.Tensor,
        rotation: Rotation,
        look: Look,
        start: int,
        past: Past | None,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None,
        pre: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of one block on `pre`, normed to x: the model's own, or written out where it is looked into."""
        pattern, forked = look.touches(layer, "attn.hook_pattern"), forks(look, layer)
        mask = self._mask(layer, start, x, explicit=pattern)
        if not (start or forked or kept is not None or any(look.touches(layer, kind) for kind in HEAD_SITES)):
            return self._family.attention(self._family.layers[layer], x, rotation, mask)
        return attend(
            self._family,
            layer,
            x,
            rotation,
            mask,
            partial(look.at, layer),
            prefix=Prefix(*past.layer(layer, start)) if past is not None and start else None,
            keep=None if kept is None else lambda key, value: kept.append((key, value)),
            pattern=pattern,
            qkv=forked_qkv(self._family, layer, pre, look) if forked else None,
        )

    def _mlp(self, layer: int, x: torch.Tensor, look: Look) -> torch.Tensor:
        block = self._family.layers[layer]
        if not look.touches(layer, "mlp.hook_post"):
            return self._family.parts(block)[3](x)
        inside = look.at(layer, "mlp.hook_post", self._family.mlp_inside(block, x))
        return self._family.mlp_out(block, inside)

    def _mask(self, layer: int, start: int, x: torch.Tensor, *, explicit: bool) -> torch.Tensor | None:
        """Who sees whom in one block, for the positions of x [b, q, d] from `start`; None is plainly causal."""
        kinds = getattr(self._decoder.config, "layer_types", None)
        window = self._window if not kinds or kinds[layer] == "sliding_attention" else None
        return causal_mask(start, x.shape[1], window, x.device, explicit=explicit)

    def _finish(
        self,
        layer: int,
        hidden: torch.Tensor,
        interventions: Sequence[Intervention],
        positions: torch.Tensor | None,
        *,
        start: int = 0,
        past: Past | None = None,
    ) -> torch.Tensor:
        edit = self._editing(interventions)
        hidden = self._walk(hidden, layer, edit, start=start, past=past)
        return self._unembed(hidden, edit, positions, layer)

    def _editing(self, interventions: Iterable[Intervention]) -> Edit:
        """What applies the interventions, at sites that are known."""
        if self._head is None or self._loaded < self.n_layers:
            raise StageError(
                "this model cannot compute logits",
                why=f"only {self._loaded} of {self.n_layers} blocks are loaded",
            )
        given = list(interventions)
        self._known(i.site for i in given)
        return Edit(given, self.device)

    def _unembed(self, hidden: torch.Tensor, edit: Edit, positions: torch.Tensor | None, first: int) -> torch.Tensor:
        """Logits of a walk that is over, if nothing was left undone."""
        if edit.pending:
            raise StageError(
                f"an intervention at {min(edit.pending)} did not happen",
                why=f"the run started at block {first}",
                code="site-not-reached",
            )
        if positions is not None:
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            hidden = hidden[rows, positions.to(hidden.device)]
        hidden = self._family.final_norm(hidden.to(_home(self._family.final_norm)))
        return self._head(hidden.to(_home(self._head))).to(self.device)  # type: ignore[misc]


def _home(module: Any) -> torch.device:
    """Where a module computes: its weights' device, or where accelerate brings them for the call."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)  # type: ignore[union-attr]
    return next(module.parameters()).device
