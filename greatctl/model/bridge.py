"""The other engine: TransformerLens, for sites that lean does not know, and as the oracle of the tests.

`TransformerBridge` wraps the Hugging Face module in place and computes attention eagerly, so that every inner
site fires. It is slower and heavier (five seconds of import); nothing hot goes through it. Compatibility mode
is never switched on: it folds and centres weights, and the residual stream would be another one than the SAE
was trained on. This is the only file that imports `transformer_lens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import StageError, UsageError
from .families import heads_of
from .interface import Intervention, Site, Start, unknown_site

if TYPE_CHECKING:
    from .interface import Streams
    from .loading import ModelInfo
    from .past import Past

__all__ = ["BridgeModel"]


class BridgeModel:
    """`FrozenModel` over a `TransformerBridge`; the contract is there. `hf` must not be used elsewhere."""

    engine = "transformer-lens"
    reuses_prefix = False

    def __init__(self, hf: Any, info: ModelInfo, tokenizer: Any, special_ids: Sequence[int]) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        hf.eval().requires_grad_(False)
        weight = hf.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.name, self.revision = info.name, info.revision
        self.n_layers, self.d_model, self.d_vocab, self.n_ctx = (
            info.n_layers,
            info.d_model,
            info.d_vocab,
            info.n_ctx,
        )
        self.n_heads, self.n_kv_heads, self.d_head, self.d_mlp = heads_of(hf.config)
        self.tokenizer, self.special_ids = tokenizer, list(special_ids)
        self._bridge: Any = TransformerBridge.boot_transformers(
            info.name, hf_model=hf, tokenizer=tokenizer, device=str(self.device), dtype=self.dtype
        )
        self._sites = sorted(self._bridge.hook_dict)

    def sites(self) -> list[str]:
        """Every hook of the bridge."""
        return list(self._sites)

    @torch.no_grad()
    def capture(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations at `sites`; see `FrozenModel.capture`. Head sites are [b, p, head, d_head]."""
        self._known(sites)
        if not sites:
            return {}
        # the bridge silently drops the hooks of the block it stops at, so it stops one later
        deepest = max(Site.parse(s).layer for s in sites) + 1
        stop = {"stop_at_layer": deepest} if deepest < self.n_layers else {}
        _, cache = self._bridge.run_with_cache(
            tokens.to(self.device), names_filter=list(sites), use_cache=False, output_attentions=False, **stop
        )
        missing = [s for s in sites if s not in cache]
        if missing:
            raise StageError(f"the site {missing[0]} did not fire", why="TransformerLens ran past it in silence")
        return {site: cache[site] for site in sites}

    def capture_all(self, tokens: torch.Tensor, sites: Sequence[str]) -> tuple[dict[str, torch.Tensor], Past]:
        """Always refused: TransformerLens cannot resume behind a prefix (`reuses_prefix` is False)."""
        raise _no_prefix()

    def past(self, tokens: torch.Tensor) -> Past:
        """Always refused, as `capture_all`."""
        raise _no_prefix()

    def run(
        self,
        tokens: torch.Tensor,
        interventions: Sequence[Intervention] = (),
        *,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits under interventions; see `FrozenModel.run`."""
        return self._finish(tokens.to(self.device), interventions, positions)

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
        """Logits from the residual entering block `layer`; see `FrozenModel.resume`. Saves no time here.

        Raises:
            UsageError: `start` is not 0; TransformerLens cannot resume behind a prefix.
        """
        if start:
            raise _no_prefix()
        early = [i.site for i in interventions if Site.parse(i.site).layer < layer]
        if early:
            raise StageError(
                f"an intervention at {early[0]} did not happen",
                why=f"the run started at block {layer}",
                code="site-not-reached",
            )
        residual = residual.to(self.device, self.dtype)
        return self._finish(residual, interventions, positions, start_at_layer=layer)

    def climb(
        self,
        starts: Sequence[Start],
        *,
        positions: torch.Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
    ) -> torch.Tensor:
        """Always refused, as `capture_all`."""
        raise _no_prefix()

    def head_outputs(self, layer: int, z: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """Always refused: single heads' inputs and outputs are told apart by the lean engine alone."""
        raise _no_heads()

    def head_values(
        self, layer: int, streams: Streams, heads: Sequence[int], *, start: int = 0, past: Past | None = None
    ) -> torch.Tensor:
        """Always refused, as `head_outputs`."""
        raise _no_heads()

    def mlp_values(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """Always refused, as `head_outputs`."""
        raise _no_heads()

    def check(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, float]:
        """Every site fires (else an error); the bridge itself is the oracle, so the difference is 0."""
        return dict.fromkeys(self.capture(tokens, sites), 0.0)

    def accelerate(self, tokens: torch.Tensor, sites: Sequence[str], *, compiled: bool = False) -> str | None:
        """Nothing to fuse here: TransformerLens computes every step by itself, so that its hooks fire."""
        return "the transformer-lens engine has no fused form"

    def _known(self, sites: Sequence[str]) -> None:
        for name in sites:
            if name not in self._bridge.hook_dict:
                raise unknown_site(name, self._sites)

    def _finish(
        self,
        start: torch.Tensor,
        interventions: Sequence[Intervention],
        positions: torch.Tensor | None,
        **how: Any,
    ) -> torch.Tensor:
        self._known([i.site for i in interventions])
        fired: set[str] = set()
        hooks = [(i.site, _hook(i, fired)) for i in interventions]
        logits = self._bridge.run_with_hooks(start, fwd_hooks=hooks, use_cache=False, **how)
        silent = sorted({i.site for i in interventions} - fired)
        if silent:
            raise StageError(f"an intervention at {silent[0]} did not happen", why="its hook did not fire")
        if positions is None:
            return logits
        return logits[torch.arange(len(logits), device=logits.device), positions.to(logits.device)]


def _no_prefix() -> UsageError:
    return UsageError(
        "TransformerLens cannot reuse a prefix",
        why="its start_at_layer takes a residual, but no keys and values",
        fix="resume at position 0, or use --engine lean",
    )


def _hook(intervention: Intervention, fired: set[str]) -> Callable[..., torch.Tensor]:
    if intervention.site.endswith("hook_resid_mid"):
        raise UsageError(
            f"{intervention.site} cannot be edited through TransformerLens",
            why="its resid_mid is the norm's input, behind the skip connection: half of an edit is lost",
            fix="use --engine lean, or edit hook_attn_out instead",
        )

    def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:
        fired.add(intervention.site)
        return intervention.edit(value).to(value.dtype)

    return edit


def _no_heads() -> UsageError:
    return UsageError(
        "TransformerLens does not tell the heads' outputs apart here",
        why="it would have to be set up for it before anything runs",
        fix="use --engine lean",
    )
