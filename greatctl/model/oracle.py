"""The model's own forward, listened to by hooks: what the lean engine is held against.

Nothing of the walk is used here, so that a mistake there cannot repeat itself here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import StageError
from .families import Family, Heads
from .interface import Site

__all__ = ["ROW_TOLERANCE", "agree", "listen", "row_difference"]

# relative to the largest value at the site; two orders of the same sum differ by about one part in 2^mantissa
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# the same of a typical row's length, where two programs round at different steps
ROW_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def row_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far rows of a and b [b, p, d] lie apart, relative to their length in b: the median row, in float32."""
    apart = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(1e-12)
    return float(apart.median())


@torch.no_grad()
def listen(family: Family, heads: Heads, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors at `sites` during the model's own forward on tokens [b, p], shaped as `FrozenModel` says."""
    seen: dict[str, torch.Tensor] = {}
    patterns = [name for name in sites if Site.parse(name).kind == "attn.hook_pattern"]
    rest = [name for name in sites if name not in patterns]
    if rest:
        with _hooks(family, heads, rest, seen):
            family.decoder(input_ids=tokens, use_cache=False)
    if patterns:  # SDPA never forms them
        with _eager(family.decoder), _hooks(family, heads, patterns, seen):
            family.decoder(input_ids=tokens, use_cache=False)
    return seen


def agree(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Largest difference relative to the largest value, per site.

    Raises:
        StageError: a site disagrees beyond the tolerance of `dtype`; names the site.
    """
    found = {}
    wide = torch.promote_types(dtype, torch.float32)
    for site, value in ours.items():
        expected = truth[site].to(value.device, wide)
        found[site] = float((value.to(wide) - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not found[site] <= _TOLERANCE[dtype]:
            raise StageError(
                f"the lean engine disagrees with Hugging Face at {site}",
                why=f"relative difference {found[site]:.2e}, tolerance {_TOLERANCE[dtype]:.0e} for {dtype}",
                fix="use --engine transformer-lens, and report this model",
                code="engine-disagreement",
            )
    return found


@contextmanager
def _hooks(family: Family, heads: Heads, sites: Sequence[str], seen: dict[str, torch.Tensor]) -> Iterator[None]:
    """Hooks that put the tensor at each site into `seen`."""
    handles = []
    for name in sites:
        site = Site.parse(name)
        module, part = _place(family, site)

        def on_input(_: Any, args: tuple, kwargs: dict, *, name: str = name, kind: str = site.kind) -> None:
            seen[name] = _shaped(args[0] if args else kwargs["hidden_states"], kind, heads)

        def on_output(
            _: Any, args: tuple, output: Any, *, name: str = name, kind: str = site.kind, part: int = part
        ) -> None:
            if kind == "attn.hook_pattern":
                seen[name] = output[1]
                return
            value = output[0] if isinstance(output, tuple) else output
            if kind in ("attn.hook_q", "attn.hook_k", "attn.hook_v"):
                width = (heads.n_heads if kind == "attn.hook_q" else heads.n_kv_heads) * heads.d_head
                value = value[..., part * width : (part + 1) * width]
            seen[name] = _shaped(value, kind, heads)

        if part < 0:
            handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(on_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(family: Family, site: Site) -> tuple[Any, int]:
    """The module that a site is heard at, and which part of its output it is (-1: its input)."""
    block = family.layers[site.layer]
    _, attention, norm2, mlp = family.parts(block)
    places = {
        "hook_resid_pre": (block, -1),
        "hook_resid_mid": (norm2, -1),
        "hook_resid_post": (block, 0),
        **dict.fromkeys(("hook_q_input", "hook_k_input", "hook_v_input"), (block, -1)),
        "hook_mlp_in": (norm2, -1),
        "hook_attn_out": (attention, 0),
        "hook_mlp_out": (mlp, 0),
        "attn.hook_pattern": (attention, 0),
    }
    return places.get(site.kind) or family.projections(block)[site.kind]


def _shaped(value: torch.Tensor, kind: str, heads: Heads) -> torch.Tensor:
    """Split into heads where the site has them, or copied for each head where each has its own."""
    if kind in ("hook_q_input", "hook_k_input", "hook_v_input"):
        return value.unsqueeze(2).expand(-1, -1, heads.n_heads if kind == "hook_q_input" else heads.n_kv_heads, -1)
    return value.unflatten(-1, (-1, heads.d_head)) if kind.startswith("attn.hook_") else value


@contextmanager
def _eager(decoder: Any) -> Iterator[None]:
    """The model's own explicit softmax, for as long as the block lasts."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
