"""What the lean engine must know of a family: where its parts are, and how a projection becomes heads.

Every family here computes, in every block,

    mid  = pre + attention(norm1(pre))
    post = mid + mlp(norm2(mid))

and differs in names, in how positions enter (RoPE, or learned positions at the embedding), and in whether the
projections lie in one matrix. An adapter calls the model's own modules, not their weights, so that biases, norms
of queries and keys, and weights that are moved in for the call all take part. Only where single heads are told apart
(`reading`, `writing`) does it hand out blocks of the weights themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["GPT2", "Family", "Heads", "Rotary", "Rotation", "family_of", "half_turn", "heads_of"]

Rotation = tuple[torch.Tensor, torch.Tensor] | None
"""Cosine and sine [1, q, d_head] of the positions, or None where positions are added at the embedding."""


class Heads(NamedTuple):
    """The widths inside a block."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int


class Family(Protocol):
    """One family's blocks. x is [b, q, d_model] after a norm; heads are [b, q, head, d_head] unless told."""

    decoder: Any
    layers: Any
    final_norm: Any

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The residual stream that enters block 0, for tokens [b, p]."""
        ...

    def rotation(self, hidden: torch.Tensor, where: torch.Tensor) -> Rotation:
        """The rotation of the positions `where` [q]."""
        ...

    def parts(self, block: Any) -> tuple[Any, Any, Any, Any]:
        """norm1, attention, norm2, mlp of a block."""
        ...

    def attention(self, block: Any, x: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        """The model's own attention, whole sequence, [b, p, d_model]."""
        ...

    def qkv(self, block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys, values straight from the projections."""
        ...

    def reading(self, block: Any, third: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights [head, d_head, d_model] and biases [head, d_head] of the queries (0), keys (1) or values (2)."""
        ...

    def writing(self, block: Any) -> torch.Tensor:
        """Weights of the output projection, [n_heads, d_head, d_model]."""
        ...

    def turned(
        self, block: Any, q: torch.Tensor, k: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed and rotated queries and keys, [b, head, q, d_head]."""
        ...

    def scaling(self, layer: int) -> float:
        """What scores are multiplied with."""
        ...

    def attention_out(self, block: Any, z: torch.Tensor) -> torch.Tensor:
        """z [b, q, n_heads * d_head] through the output projection."""
        ...

    def mlp_inside(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        """What enters the down projection, [b, q, d_mlp]."""
        ...

    def mlp_out(self, block: Any, inside: torch.Tensor) -> torch.Tensor:
        """`inside` through the down projection."""
        ...

    def projections(self, block: Any) -> dict[str, tuple[Any, int]]:
        """Per inner site: the module, and which third of its output it is, or -1 for the module's input."""
        ...


class Rotary:
    """Llama, Mistral, Qwen 2 (biases) and Qwen 3 (norms on queries and keys)."""

    def __init__(self, decoder: Any, heads: Heads) -> None:
        self.decoder, self.layers, self.final_norm = decoder, decoder.layers, decoder.norm
        self._d_head = heads.d_head

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder.embed_tokens(tokens)

    def rotation(self, hidden: torch.Tensor, where: torch.Tensor) -> Rotation:
        return self.decoder.rotary_emb(hidden, where.unsqueeze(0))

    def parts(self, block: Any) -> tuple[Any, Any, Any, Any]:
        return block.input_layernorm, block.self_attn, block.post_attention_layernorm, block.mlp

    def attention(self, block: Any, x: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        return block.self_attn(hidden_states=x, position_embeddings=rotation, attention_mask=mask)[0]

    def qkv(self, block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attn, shape = block.self_attn, (*x.shape[:-1], -1, self._d_head)
        return attn.q_proj(x).view(shape), attn.k_proj(x).view(shape), attn.v_proj(x).view(shape)

    def reading(self, block: Any, third: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        attn = block.self_attn
        linear = (attn.q_proj, attn.k_proj, attn.v_proj)[third]
        return _in_heads(linear.weight, linear.bias, self._d_head)

    def writing(self, block: Any) -> torch.Tensor:
        return block.self_attn.o_proj.weight.T.unflatten(0, (-1, self._d_head))

    def turned(
        self, block: Any, q: torch.Tensor, k: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attn = block.self_attn
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        assert rotation is not None
        cos, sin = (part.unsqueeze(1) for part in rotation)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin

    def scaling(self, layer: int) -> float:
        return self._d_head**-0.5

    def attention_out(self, block: Any, z: torch.Tensor) -> torch.Tensor:
        return block.self_attn.o_proj(z)

    def mlp_inside(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        mlp = block.mlp
        return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)

    def mlp_out(self, block: Any, inside: torch.Tensor) -> torch.Tensor:
        return block.mlp.down_proj(inside)

    def projections(self, block: Any) -> dict[str, tuple[Any, int]]:
        attn = block.self_attn
        return {
            "attn.hook_q": (attn.q_proj, 0),
            "attn.hook_k": (attn.k_proj, 0),
            "attn.hook_v": (attn.v_proj, 0),
            "attn.hook_z": (attn.o_proj, -1),
            "mlp.hook_post": (block.mlp.down_proj, -1),
        }


class GPT2:
    """GPT-2: learned positions, LayerNorm, biases, and one matrix for queries, keys and values."""

    def __init__(self, decoder: Any, heads: Heads) -> None:
        self.decoder, self.layers, self.final_norm = decoder, decoder.h, decoder.ln_f
        self._d_head = heads.d_head

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        where = torch.arange(tokens.shape[1], device=tokens.device)
        words = self.decoder.wte(tokens)
        return words + self.decoder.wpe(where.unsqueeze(0)).to(words.device)

    def rotation(self, hidden: torch.Tensor, where: torch.Tensor) -> Rotation:
        return None

    def parts(self, block: Any) -> tuple[Any, Any, Any, Any]:
        return block.ln_1, block.attn, block.ln_2, block.mlp

    def attention(self, block: Any, x: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        return block.attn(x, attention_mask=mask)[0]

    def qkv(self, block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = block.attn.c_attn(x).chunk(3, dim=-1)
        shape = (*x.shape[:-1], -1, self._d_head)
        return q.view(shape), k.view(shape), v.view(shape)

    def reading(self, block: Any, third: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        matrix = block.attn.c_attn  # a Conv1D: [d_model, 3 * d_model]
        return _in_heads(matrix.weight.chunk(3, dim=1)[third].T, matrix.bias.chunk(3)[third], self._d_head)

    def writing(self, block: Any) -> torch.Tensor:
        return block.attn.c_proj.weight.unflatten(0, (-1, self._d_head))

    def turned(
        self, block: Any, q: torch.Tensor, k: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return q.transpose(1, 2), k.transpose(1, 2)

    def scaling(self, layer: int) -> float:
        config = self.decoder.config
        scale = self._d_head**-0.5 if config.scale_attn_weights else 1.0
        return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale

    def attention_out(self, block: Any, z: torch.Tensor) -> torch.Tensor:
        return block.attn.c_proj(z)

    def mlp_inside(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.mlp.act(block.mlp.c_fc(x))

    def mlp_out(self, block: Any, inside: torch.Tensor) -> torch.Tensor:
        return block.mlp.c_proj(inside)

    def projections(self, block: Any) -> dict[str, tuple[Any, int]]:
        attn = block.attn
        return {
            "attn.hook_q": (attn.c_attn, 0),
            "attn.hook_k": (attn.c_attn, 1),
            "attn.hook_v": (attn.c_attn, 2),
            "attn.hook_z": (attn.c_proj, -1),
            "mlp.hook_post": (block.mlp.c_proj, -1),
        }


def _in_heads(weight: torch.Tensor, bias: torch.Tensor | None, d_head: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A projection's weight [out, d_model] and bias [out], cut into heads."""
    return weight.unflatten(0, (-1, d_head)), None if bias is None else bias.unflatten(0, (-1, d_head))


def heads_of(config: Any) -> Heads:
    """The widths inside a block, from a Hugging Face configuration of any family."""
    n_heads, d_model = config.num_attention_heads, config.hidden_size
    if config.model_type == "gpt2":
        return Heads(n_heads, n_heads, d_model // n_heads, config.n_inner or 4 * d_model)
    return Heads(
        n_heads,
        getattr(config, "num_key_value_heads", None) or n_heads,
        getattr(config, "head_dim", None) or d_model // n_heads,
        getattr(config, "intermediate_size", None) or 4 * d_model,
    )


def family_of(decoder: Any) -> Family:
    """The adapter of a bare Hugging Face decoder."""
    heads = heads_of(decoder.config)
    return GPT2(decoder, heads) if hasattr(decoder, "wpe") else Rotary(decoder, heads)


def half_turn(x: torch.Tensor) -> torch.Tensor:
    """RoPE's quarter turn: the halves of the last dimension swapped, the new first one negated."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
