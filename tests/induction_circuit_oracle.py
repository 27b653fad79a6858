"""Activation patching in the plainest way: one Hugging Face forward a cell, with hooks on its own modules.

Nothing of greatctl is used here, no batch, no resuming, no cache, so that a mistake there cannot repeat
itself here. Knows Llama, Mistral, Qwen 2, Qwen 3 and GPT-2. A pattern is patched through what it makes: the
head's z at that query is the new row of the pattern times the values of this very run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("z", "q", "k", "v", "pattern")
Edit = Callable[[torch.Tensor], torch.Tensor]


class Oracle:
    """Captures and patches of one model. Values are [p, d] in the stream, [p, head, d_head] inside, and
    [head, query, key] for patterns.
    """

    def __init__(self, hf: Any) -> None:
        self.hf, c = hf, hf.config
        self.n_layers, self.n_heads = c.num_hidden_layers, c.num_attention_heads
        self.n_kv = getattr(c, "num_key_value_heads", None) or self.n_heads
        self.d_head = getattr(c, "head_dim", None) or c.hidden_size // self.n_heads
        self.eager = copy.deepcopy(hf)
        self.eager.set_attn_implementation("eager")
        self.gpt2 = hasattr(hf, "transformer")
        self.blocks = hf.transformer.h if self.gpt2 else hf.model.layers

    def units(self, site: str) -> int:
        """Heads of a site; 1 in the stream."""
        return 1 if site in STREAM else self.n_kv if site in ("k", "v") else self.n_heads

    def logits(self, ids: Sequence[int], hooks: Sequence[Any] = ()) -> torch.Tensor:
        """Last-position logits [V]."""
        with placed(hooks), torch.no_grad():
            return self.hf(torch.tensor([ids]), use_cache=False).logits[0, -1]

    def capture(self, ids: Sequence[int], site: str, layer: int) -> torch.Tensor:
        """The value of a site in the run of a prompt."""
        if site == "pattern":
            with torch.no_grad():
                found = self.eager(torch.tensor([ids]), use_cache=False, output_attentions=True)
            return found.attentions[layer][0]
        seen: list[torch.Tensor] = []
        self.logits(ids, [self._hook(site, layer, lambda value: (seen.append(value.clone()), value)[1])])
        return seen[0]

    def patched(self, ids: Sequence[int], site: str, layer: int, at: int, new: torch.Tensor, unit: int) -> torch.Tensor:
        """Last-position logits [V] with the site's value at position `at` (of one unit, inside a block)
        replaced by that of `new`.
        """
        if site == "pattern":
            return self._with_pattern(ids, layer, at, new, unit)
        calls: list[int] = []

        def write(value: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            value = value.clone()
            where = (at,) if site in STREAM else (at, unit)
            value[where] = new[where]
            return value

        logits = self.logits(ids, [self._hook(site, layer, write)])
        assert calls == [1]
        return logits

    def _with_pattern(self, ids: Sequence[int], layer: int, at: int, new: torch.Tensor, unit: int) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def keep(value: torch.Tensor) -> torch.Tensor:
            kept.append(value)
            return value

        def write(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[at, unit] = new[unit, at] @ kept[0][:, unit // (self.n_heads // self.n_kv)]
            return z

        return self.logits(ids, [self._hook("v", layer, keep), self._hook("z", layer, write)])

    def _hook(self, site: str, layer: int, edit: Edit) -> tuple[Any, str, Callable]:
        block = self.blocks[layer]
        attention, mlp = (block.attn, block.mlp) if self.gpt2 else (block.self_attn, block.mlp)
        if site == "resid_pre":
            return block, "in", _on_input(edit)
        if site in ("resid_post", "attn_out", "mlp_out"):
            return {"resid_post": block, "attn_out": attention, "mlp_out": mlp}[site], "out", _on_output(edit)
        if site == "resid_mid":
            return block, "mid", self._on_middle(block, attention, edit)
        if site == "z":
            module = attention.c_proj if self.gpt2 else attention.o_proj
            return module, "in", _on_input(self._by_head(edit, slice(None)))
        third = ("q", "k", "v").index(site)
        if self.gpt2:
            width = self.n_heads * self.d_head
            return attention.c_attn, "out", _on_output(self._by_head(edit, slice(third * width, (third + 1) * width)))
        module = (attention.q_proj, attention.k_proj, attention.v_proj)[third]
        return module, "out", _on_output(self._by_head(edit, slice(None)))

    def _by_head(self, edit: Edit, part: slice) -> Edit:
        def whole(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            mine = value[:, part]
            value[:, part] = edit(mine.reshape(len(mine), -1, self.d_head)).reshape(mine.shape)
            return value

        return whole

    def _on_middle(self, block: Any, attention: Any, edit: Edit) -> Callable[[], list[Any]]:
        """What leaves the attention is changed by as much as the middle of the stream shall change."""
        entered: list[torch.Tensor] = []

        def keep(value: torch.Tensor) -> torch.Tensor:
            entered.append(value)
            return value

        def write(out: torch.Tensor) -> torch.Tensor:
            middle = entered[-1] + out
            return out + (edit(middle) - middle)

        return lambda: [
            block.register_forward_pre_hook(_on_input(keep), with_kwargs=True),
            attention.register_forward_hook(_on_output(write)),
        ]


@contextmanager
def placed(hooks: Sequence[Any]) -> Iterator[None]:
    """Hooks of `Oracle._hook` for the time of a forward."""
    handles: list[Any] = []
    for module, where, hook in hooks:
        if where == "in":
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif where == "out":
            handles.append(module.register_forward_hook(hook))
        else:
            handles += hook()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(edit: Edit) -> Callable:
    def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (edit(args[0][0])[None], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"][0])[None]}

    return hook


def _on_output(edit: Edit) -> Callable:
    def hook(module: Any, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0][0])[None], *output[1:])
        return edit(output[0])[None]

    return hook


def plain_map(oracle: Oracle, ids: Sequence[int], source: Sequence[int], site: str, layer: int) -> torch.Tensor:
    """Logits [units, p, V] of the run of `ids` with each cell of one layer taken from the run of `source`."""
    new = oracle.capture(source, site, layer)
    return torch.stack(
        [
            torch.stack([oracle.patched(ids, site, layer, at, new, unit) for at in range(len(ids))])
            for unit in range(oracle.units(site))
        ]
    )
