"""Blocks made faster for long captures: fused projections, and one compiled program for all of them.

Queries, keys and values are three products of one input, gate and up are two; stacked into one matrix each they are
one product. The stacked matrix holds the only copy: the model's own modules get views into it, so that everything else
(the plain walk, the model's own forward, the self-check) goes on working and no memory is spent.

A block is then a pure function of its input and its weights. Since all blocks have the same shapes, torch.compile
sees one function, compiles it once, and every block runs it. Whoever switches this on compares it with the plain
walk first (`LeanModel.accelerate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .families import Family, Heads, Rotary, Rotation, half_turn

__all__ = ["FastBlocks", "why_not"]


class _Weights(NamedTuple):
    """The weights of one block; None where the family has no such bias or norm."""

    norm1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    norm2: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


_Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, _Weights], torch.Tensor]


def why_not(family: Family) -> str | None:
    """Why a family's blocks cannot be fused, or None."""
    if not isinstance(family, Rotary):
        return "its family has no fused form"
    attn, mlp = family.layers[0].self_attn, family.layers[0].mlp
    if any(p.device.type == "meta" for p in family.decoder.parameters()):
        return "some of its weights are moved in for each call"
    plain = all(type(part) is torch.nn.Linear for part in (attn.q_proj, attn.o_proj, mlp.gate_proj, mlp.down_proj))
    return None if plain and mlp.gate_proj.bias is None else "its projections are not plain matrices"


class FastBlocks:
    """The fused blocks of a model, compiled for one shape of input where that is asked for.

    Args:
        compiled: the shape [b, p, d_model] to compile for, or None; every other shape runs uncompiled, so that no
            odd last batch starts the compiler again.
    """

    def __init__(self, family: Rotary, heads: Heads, *, compiled: Sequence[int] | None = None) -> None:
        self._weights = [_fused(block) for block in family.layers]
        if self._weights[0].qkv.is_cuda:
            torch.cuda.empty_cache()  # the single matrices just left holes that no stacked one fits into
        block = family.layers[0]
        self._plain = _block_function(heads, block.input_layernorm.variance_epsilon, block.mlp.act_fn)
        self.compile_for(compiled)

    def compile_for(self, shape: Sequence[int] | None) -> None:
        """Compile for inputs of `shape`, at the next call; None: do not compile."""
        self._shape = None if shape is None else tuple(shape)
        self._compiled = self._plain if shape is None else torch.compile(self._plain, dynamic=False, fullgraph=True)

    def __call__(self, layer: int, hidden: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """`hook_resid_post` of one block from its `hook_resid_pre` [b, p, d_model]; plainly causal, from position 0."""
        assert rotation is not None
        way = self._compiled if tuple(hidden.shape) == self._shape else self._plain
        return way(hidden, rotation[0], rotation[1], self._weights[layer])


def _fused(block: Any) -> _Weights:
    attn, mlp = block.self_attn, block.mlp
    qkv, qkv_bias = _stacked([attn.q_proj, attn.k_proj, attn.v_proj])
    gate_up, _ = _stacked([mlp.gate_proj, mlp.up_proj])
    return _Weights(
        block.input_layernorm.weight.detach(),
        qkv,
        qkv_bias,
        attn.q_norm.weight.detach() if hasattr(attn, "q_norm") else None,
        attn.k_norm.weight.detach() if hasattr(attn, "k_norm") else None,
        attn.o_proj.weight.detach(),
        None if attn.o_proj.bias is None else attn.o_proj.bias.detach(),
        block.post_attention_layernorm.weight.detach(),
        gate_up,
        mlp.down_proj.weight.detach(),
    )


@torch.no_grad()
def _stacked(modules: Sequence[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (and biases) of the modules below each other; the modules keep views into the result."""
    weight = torch.cat([module.weight for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    row = 0
    for module in modules:
        stop = row + module.out_features
        module.weight = torch.nn.Parameter(weight[row:stop], requires_grad=False)
        if bias is not None:
            module.bias = torch.nn.Parameter(bias[row:stop], requires_grad=False)
        row = stop
    return weight, bias


def _block_function(heads: Heads, epsilon: float, activation: Callable[[torch.Tensor], torch.Tensor]) -> _Block:
    """A block as a pure function, with the steps and roundings of the model's own modules."""
    widths = [heads.n_heads * heads.d_head, heads.n_kv_heads * heads.d_head, heads.n_kv_heads * heads.d_head]
    grouped = heads.n_kv_heads != heads.n_heads

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)

    def run(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, w: _Weights) -> torch.Tensor:
        parts = F.linear(norm(hidden, w.norm1), w.qkv, w.qkv_bias).split(widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, heads.d_head)) for part in parts)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = norm(q, w.q_norm), norm(k, w.k_norm)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        mid = hidden + F.linear(z.transpose(1, 2).flatten(2), w.out, w.out_bias)
        gate, up = F.linear(norm(mid, w.norm2), w.gate_up).chunk(2, dim=-1)
        return mid + F.linear(activation(gate) * up, w.down)

    return run
