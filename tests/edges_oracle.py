"""Edges and masked runs in the plainest way, on Hugging Face modules alone; knows Llama, Mistral, Qwen 2 and Qwen 3.

Nothing of greatctl is used here. An edge is one forward with one hook. A masked run is written out input by input:
every projection's input is a sum over named senders, of what they add here or in the other run, as the definition
says, with no differences, no batch and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

Run = dict[str, torch.Tensor]  # what each sender adds [p, d], and the places of the stream


class EdgeOracle:
    """One model; names are those of `greatctl.patching.graph`."""

    def __init__(self, hf: Any) -> None:
        self.hf, c = hf, hf.config
        self.blocks = hf.model.layers
        self.n_heads, self.n_kv = c.num_attention_heads, c.num_key_value_heads
        self.d_head = getattr(c, "head_dim", None) or c.hidden_size // self.n_heads

    def logits(self, ids: Sequence[int], hooks: Sequence[tuple[Any, str, Callable]] = ()) -> torch.Tensor:
        """Last-position logits [V]."""
        handles = [
            module.register_forward_pre_hook(hook) if where == "in" else module.register_forward_hook(hook)
            for module, where, hook in hooks
        ]
        try:
            with torch.no_grad():
                return self.hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()

    def run(self, ids: Sequence[int]) -> Run:
        """What every sender adds, and the stream `pre3`, `mid3` and `end`."""
        found: Run = {}

        def keep(name: str, where: str) -> Callable:
            def hook(module: Any, args: tuple, output: Any = None) -> None:
                found[name] = (args[0] if where == "in" else output)[0].clone()

            return hook

        places = [(self.hf.model.embed_tokens, "out", "embed"), (self.hf.model.norm, "in", "end")]
        for at, block in enumerate(self.blocks):
            places += [(block.input_layernorm, "in", f"pre{at}"), (block.post_attention_layernorm, "in", f"mid{at}")]
            places += [(block.self_attn.o_proj, "in", f"z{at}"), (block.mlp, "out", f"m{at}")]
        self.logits(ids, [(module, where, keep(name, where)) for module, where, name in places])
        for at in range(len(self.blocks)):
            z = found.pop(f"z{at}")
            for head in range(self.n_heads):
                found[f"a{at}.h{head}"] = self.added(at, head, z[:, head * self.d_head : (head + 1) * self.d_head])
        return found

    def added(self, layer: int, head: int, z: torch.Tensor) -> torch.Tensor:
        """What a head adds."""
        weight = self.blocks[layer].self_attn.o_proj.weight
        return z @ weight[:, head * self.d_head : (head + 1) * self.d_head].T

    def edge(self, base: Sequence[int], name: str, change: torch.Tensor, run: Run | None = None) -> torch.Tensor:
        """Last-position logits of the `run` of `base` with `change` [p, d] added to the one input `name` (`a1.kv0.k`)."""
        run = self.run(base) if run is None else run
        if name == "logits.in":
            return self.logits(base, [(self.hf.model.norm, "in", lambda module, args: (args[0] + change[None],))])
        place, *rest = name.split(".")
        block = self.blocks[int(place[1:])]
        if place[0] == "m":
            new = block.mlp(block.post_attention_layernorm(run[f"mid{place[1:]}"] + change)[None])
            return self.logits(base, [(block.mlp, "out", lambda module, args, output: new)])
        slot, head = rest[1], int(rest[0].removeprefix("kv").removeprefix("h"))
        module = getattr(block.self_attn, f"{slot}_proj")
        cut = slice(head * self.d_head, (head + 1) * self.d_head)
        x = block.input_layernorm(run[f"pre{place[1:]}"] + change)
        new = F.linear(x, module.weight[cut], None if module.bias is None else module.bias[cut])

        def write(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, :, cut] = new
            return output

        return self.logits(base, [(module, "out", write)])

    @torch.no_grad()
    def masked(self, inside: Sequence[int], other: Run, keeps: Callable[[str, str], bool]) -> torch.Tensor:
        """Last-position logits where `keeps(sender, input)` says which senders are this run's and not `other`'s."""
        p = len(inside)
        hidden = self.hf.model.embed_tokens(torch.tensor([inside]))
        cos, sin = self.hf.model.rotary_emb(hidden, torch.arange(p)[None])
        back = torch.arange(p)[:, None] - torch.arange(p)
        seen = (back >= 0) & (back < (getattr(self.hf.config, "sliding_window", None) or p))
        here: Run = {"embed": hidden[0]}

        def reads(name: str) -> torch.Tensor:
            return torch.stack([here[s] if keeps(s, name) else other[s] for s in here]).sum(0)

        def project(layer: int, slot: str, head: int) -> torch.Tensor:
            block, cut = self.blocks[layer], slice(head * self.d_head, (head + 1) * self.d_head)
            module = getattr(block.self_attn, f"{slot}_proj")
            name = f"a{layer}.{'h' if slot == 'q' else 'kv'}{head}.{slot}"
            x = F.linear(block.input_layernorm(reads(name)), module.weight[cut])
            x = x if module.bias is None else x + module.bias[cut]
            norm = getattr(block.self_attn, f"{slot}_norm", None)
            x = x if norm is None else norm(x)
            if slot == "v":
                return x
            first, second = x.chunk(2, dim=-1)
            return x * cos[0] + torch.cat([-second, first], -1) * sin[0]

        for layer, block in enumerate(self.blocks):
            new: Run = {}
            for head in range(self.n_heads):
                kv = head // (self.n_heads // self.n_kv)
                q, k, v = project(layer, "q", head), project(layer, "k", kv), project(layer, "v", kv)
                scores = (q @ k.T / self.d_head**0.5).masked_fill(~seen, -torch.inf)
                new[f"a{layer}.h{head}"] = self.added(layer, head, scores.softmax(-1) @ v)
            here |= new
            here[f"m{layer}"] = block.mlp(block.post_attention_layernorm(reads(f"m{layer}.in"))[None])[0]
        return self.hf.lm_head(self.hf.model.norm(reads("logits.in")))[-1]
