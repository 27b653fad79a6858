"""The hot engine: a Hugging Face decoder, walked block by block.

The Llama family (Llama, Mistral, Qwen 2 and 3) computes in every block

    mid  = pre + attention(norm(pre))
    post = mid + mlp(norm(mid))

so instead of hanging hooks on it, this engine writes those two lines itself with the model's own modules.
Every site is then a plain local tensor: capturing is keeping it, editing is replacing it, stopping is not
going on, resuming is starting in the middle. Attention runs through SDPA, which never materialises the [p, p]
scores. `check` holds the walk against the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from ..errors import StageError, UsageError
from .interface import Intervention, Site, site_names, unknown_site

if TYPE_CHECKING:
    from .loading import ModelInfo

__all__ = ["LeanModel"]


# relative to the largest value at the site; two orders of the same sum differ by about one part in 2^mantissa
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}

_Visit = Callable[[int, str, torch.Tensor], torch.Tensor]


class _Enough(Exception):
    """Ends a capture once its deepest site was seen."""


class LeanModel:
    """`FrozenModel` over a Llama-like Hugging Face model; see the interface for the contract.

    Args:
        hf: a `…ForCausalLM`, or the bare decoder (`LlamaModel`) where only captures are needed; it
            may hold fewer blocks than the whole model.
        info: facts of the whole model.
        tokenizer: its Hugging Face tokenizer.
        special_ids: ids that are no text.
    """

    engine = "lean"

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
        self._head = getattr(hf, "lm_head", None)
        self._decoder = hf.model if self._head is not None else hf
        embedding = self._decoder.embed_tokens.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self._loaded = len(self._decoder.layers)

    def sites(self) -> list[str]:
        """Residual sites of the loaded blocks."""
        return site_names(self._loaded)

    @torch.no_grad()
    def capture(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations [b, p, d] at `sites`; see `FrozenModel.capture`."""
        wanted = set(self._known(sites))
        found: dict[str, torch.Tensor] = {}

        def keep(layer: int, kind: str, value: torch.Tensor) -> torch.Tensor:
            name = f"blocks.{layer}.{kind}"
            if name in wanted:
                found[name] = value
                if len(found) == len(wanted):
                    raise _Enough
            return value

        if wanted:
            with suppress(_Enough):
                self._walk(self._embed(tokens), 0, keep)
        return {name: found[name] for name in sites}

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
    ) -> torch.Tensor:
        """Logits from the residual entering block `layer`; see `FrozenModel.resume`."""
        if not 0 <= layer <= self.n_layers:
            raise UsageError(f"layer {layer} is out of range", why=f"the model has layers 0 to {self.n_layers - 1}")
        return self._finish(layer, residual.to(self.device, self.dtype), interventions, positions)

    @torch.no_grad()
    def check(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, float]:
        """Hold the walk against the model's own forward; see `FrozenModel.check`."""
        ours = self.capture(tokens, sites)
        truth = self._reference(tokens, sites)
        tolerance = _TOLERANCE[self.dtype]
        found = {}
        for site in sites:
            scale = truth[site].float().abs().max().clamp_min(1e-12)
            found[site] = float((ours[site].float() - truth[site].float()).abs().max() / scale)
            if not found[site] <= tolerance:
                raise StageError(
                    f"the lean engine disagrees with Hugging Face at {site}",
                    why=f"relative difference {found[site]:.2e}, tolerance {tolerance:.0e} for {self.dtype}",
                    fix="use --engine transformer-lens, and report this model",
                    code="engine-disagreement",
                )
        return found

    def _known(self, sites: Sequence[str]) -> list[str]:
        known = set(self.sites())
        for name in sites:
            if name not in known:
                raise unknown_site(name, self.sites())
        return list(sites)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.ndim != 2 or tokens.shape[1] > self.n_ctx:
            why = f"the model reads [batch, position] with at most {self.n_ctx} positions"
            raise UsageError(f"tokens of shape {list(tokens.shape)} cannot be read", why=why)
        return self._decoder.embed_tokens(tokens.to(self.device))

    def _walk(self, hidden: torch.Tensor, start: int, visit: _Visit) -> torch.Tensor:
        """Blocks `start` onwards on hidden [b, p, d]; `visit` maps a site's tensor to the next one."""
        where = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotation = self._decoder.rotary_emb(hidden, where)
        for layer in range(start, self._loaded):
            block = self._decoder.layers[layer]
            pre = visit(layer, "hook_resid_pre", hidden)
            attended, _ = block.self_attn(
                hidden_states=block.input_layernorm(pre),
                position_embeddings=rotation,
                attention_mask=self._mask(layer, hidden),
            )
            mid = visit(layer, "hook_resid_mid", pre + visit(layer, "hook_attn_out", attended))
            added = visit(layer, "hook_mlp_out", block.mlp(block.post_attention_layernorm(mid)))
            hidden = visit(layer, "hook_resid_post", mid + added)
        return hidden

    def _mask(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """None (plain causal), or [1, 1, p, p] bool where a sliding window is shorter than the sequence."""
        config = self._decoder.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if window is None or hidden.shape[1] <= window or (kinds and kinds[layer] != "sliding_attention"):
            return None
        at = torch.arange(hidden.shape[1], device=hidden.device)
        back = at[:, None] - at[None, :]
        return ((back >= 0) & (back < window))[None, None]

    def _finish(
        self,
        start: int,
        hidden: torch.Tensor,
        interventions: Sequence[Intervention],
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._head is None or self._loaded < self.n_layers:
            raise StageError(
                "this model cannot compute logits",
                why=f"only {self._loaded} of {self.n_layers} blocks are loaded",
            )
        edits: dict[str, list[Intervention]] = {}
        for intervention in interventions:
            edits.setdefault(intervention.site, []).append(intervention)
        pending = set(self._known(list(edits)))

        def edit(layer: int, kind: str, value: torch.Tensor) -> torch.Tensor:
            name = f"blocks.{layer}.{kind}"
            for intervention in edits.get(name, ()):
                value = _edited(intervention, value)
                pending.discard(name)
            return value

        hidden = self._walk(hidden, start, edit)
        if pending:
            raise StageError(
                f"an intervention at {min(pending)} did not happen",
                why=f"the run started at block {start}",
                code="site-not-reached",
            )
        if positions is not None:
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            hidden = hidden[rows, positions.to(hidden.device)]
        return self._head(self._decoder.norm(hidden))

    def _reference(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors at `sites` during the model's own forward, by hooks on its modules."""
        seen: dict[str, torch.Tensor] = {}
        handles = []
        for name in sites:
            site = Site.parse(name)
            block = self._decoder.layers[site.layer]

            def on_input(module: Any, args: tuple, kwargs: dict, *, name: str = name) -> None:
                seen[name] = args[0] if args else kwargs["hidden_states"]

            def on_output(module: Any, args: tuple, output: Any, *, name: str = name) -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            if site.kind in ("hook_resid_pre", "hook_resid_mid"):
                module = block if site.kind == "hook_resid_pre" else block.post_attention_layernorm
                handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
            else:
                module = {"hook_attn_out": block.self_attn, "hook_mlp_out": block.mlp}.get(site.kind, block)
                handles.append(module.register_forward_hook(on_output))
        try:
            self._decoder(input_ids=tokens.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _edited(intervention: Intervention, value: torch.Tensor) -> torch.Tensor:
    edited = intervention.edit(value)
    if edited.shape != value.shape:
        raise StageError(
            f"the edit at {intervention.site} changed the shape",
            why=f"{list(value.shape)} became {list(edited.shape)}",
        )
    return edited.to(value.dtype)
