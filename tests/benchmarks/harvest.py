"""Residual stream of the middle block: what the arithmetic needs, what peers take, what greatctl takes.

    python tests/benchmarks/harvest.py                                     # CPU, 8 layers, d_model 256
    python tests/benchmarks/harvest.py --shape llama3-8b --device cuda     # one GPU, random weights, bf16

Floor: the products of the needed blocks and their attention alone, on tensors of the same shapes. Peers: Hugging Face
with every hidden state, Hugging Face with a hook and an early stop, and with --bridge TransformerLens. Ours: the capture
alone and the whole inner loop of the stage over some shards (rows and statistics on the CPU), each plain, with fused
products, and with fused products and compiled blocks; and the loop with its shards written to disk.
Rounds are interleaved and the best one of each counts, so that a busy machine disturbs all alike. Every row stands
alone: one that fails prints its error. Beside it, how far its rows lie from the same model in float32 (median row,
relative; a `!` where that is a quarter more than Hugging Face's own distance), and the largest single difference from
Hugging Face.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from greatctl.model.exact import exact
from greatctl.model.families import Rotary
from greatctl.model.fast import FastBlocks
from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.model.oracle import ROW_TOLERANCE, row_difference
from greatctl.model.reading import Shard, auto_batch, begin
from greatctl.stages.behind import Behind
from greatctl.store.shards import ShardWriter

SHAPES = {
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
MODES = ("plain", "fused", "compiled")
SHARDS = 3


class _Stop(Exception):
    """Ends the peer's forward at the hook."""


@dataclass
class Way:
    """One row of the table: `go` handles `tokens` tokens; `rows`, if given, are compared with Hugging Face's."""

    name: str
    tokens: int
    go: Callable[[], Any]
    rows: Callable[[], torch.Tensor] | None = None
    seconds: float = float("inf")
    error: str = ""
    apart: float | None = None
    largest: float | None = None


def build(shape: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama of the shape, made on the device, in eval mode."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1024)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return hf.eval().requires_grad_(False)


def floor(hf: LlamaForCausalLM, blocks: int, batch: int, window: int) -> Callable[[], None]:
    """The matrix products and the attention of `blocks` blocks, and nothing else."""
    config, weight = hf.config, hf.model.layers[0].mlp.gate_proj.weight
    head = config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head

    def new(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=weight.device, dtype=weight.dtype)

    x, wide = new(batch * window, config.hidden_size), new(batch * window, config.intermediate_size)
    qkv, out = new(config.hidden_size + 2 * kv, config.hidden_size), new(config.hidden_size, config.hidden_size)
    up = new(2 * config.intermediate_size, config.hidden_size)
    down = new(config.hidden_size, config.intermediate_size)
    q = new(batch, config.num_attention_heads, window, head)
    k = new(batch, config.num_attention_heads, window, head)

    def go() -> None:
        for _ in range(blocks):
            x @ qkv.T
            torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
            x @ out.T
            x @ up.T
            wide @ down.T

    return go


def hf_all_states(hf: LlamaForCausalLM, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """What a notebook does: the whole decoder with every hidden state."""
    return hf.model(tokens, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]


def hf_early_stop(hf: LlamaForCausalLM, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """What a careful notebook does: a pre-hook on the next block that ends the pass."""
    kept = []

    def hook(module: Any, args: tuple, kwargs: dict) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = hf.model.layers[layer + 1].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        hf.model(tokens, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return kept[0]


class Ours:
    """The lean engine in its three modes, on one copy of the weights."""

    def __init__(self, hf: LlamaForCausalLM, site: str, tokens: torch.Tensor, dtype: str) -> None:
        config = hf.config
        facts = (config.num_hidden_layers, config.hidden_size, config.vocab_size, 1024)
        self.lean = LeanModel(hf, ModelInfo("random", "", "llama", *facts, dtype), None, [0, 1])
        self.site, self.tokens, self.dtype = site, tokens, dtype
        self.ids = tokens.int().cpu()
        self.length = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32)
        family = self.lean._family
        assert isinstance(family, Rotary)
        self._blocks = FastBlocks(family, self.lean._heads, compiled=(0, 0, 0))

    def switch(self, mode: str, batch: int) -> None:
        """Run blocks in this mode from now on; compiled ones for passes of `batch` whole windows."""
        self.lean._fast = None if mode == "plain" else self._blocks
        shape = (batch, self.tokens.shape[1], self.lean.d_model)
        self._blocks._shape = shape if mode == "compiled" else None

    def capture(self, mode: str, batch: int) -> torch.Tensor:
        """One pass of the first `batch` windows, left on the device."""
        self.switch(mode, batch)
        return self.lean.capture(self.tokens[:batch], [self.site])[self.site]

    def begin(self, mode: str, batch: int) -> Callable[[], Shard]:
        """All windows as one shard, begun; what is returned waits for its rows and statistics on the CPU."""
        self.switch(mode, batch)
        span = range(len(self.ids))
        return begin(self.lean, self.ids, self.length, span, [self.site], dtype=self.dtype, batch_size=batch)

    def shards(self, mode: str, batch: int) -> None:
        """`SHARDS` shards, each completed while the next is computed, as the stage does."""
        with Behind() as behind:
            for _ in range(SHARDS):
                behind.put(self.begin(mode, batch))

    def rows(self, mode: str, batch: int) -> torch.Tensor:
        """The rows of the first `batch` windows of a shard, [batch, window, d]."""
        acts = self.begin(mode, batch)()[self.site]["acts"]
        return acts[: batch * self.tokens.shape[1]].unflatten(0, (batch, -1))

    def written(self, mode: str, batch: int) -> None:
        """The same with every shard hashed and written durably to a temporary folder."""

        def write(number: int, finish: Callable[[], Shard]) -> None:
            shard = finish()[self.site]
            writer.write(number, shard, len(shard["acts"]))

        with tempfile.TemporaryDirectory() as folder, Behind() as behind:
            writer = ShardWriter(Path(folder))
            for number in range(SHARDS):
                behind.put(partial(write, number, self.begin(mode, batch)))


def ways(hf: LlamaForCausalLM, ours: Ours, layer: int, batches: list[int]) -> list[Way]:
    """The rows of the table, for each size of a pass."""
    found = []
    for batch in batches:
        tokens = ours.tokens[:batch]
        n = tokens.numel()
        early = partial(hf_early_stop, hf, tokens, layer)
        found += [
            Way(f"floor: products, attention | {batch}", n, floor(hf, layer + 1, batch, tokens.shape[1])),
            Way(f"Hugging Face, all hidden states | {batch}", n, partial(hf_all_states, hf, tokens, layer)),
            Way(f"Hugging Face, hook, early stop | {batch}", n, early, early),
        ]
        for mode in MODES:
            go = partial(ours.capture, mode, batch)
            found.append(Way(f"greatctl capture, {mode} | {batch}", n, go, go))
        for mode in MODES:
            go, rows = partial(ours.shards, mode, batch), partial(ours.rows, mode, batch)
            n_all = SHARDS * ours.tokens.numel()
            found.append(Way(f"greatctl rows, statistics, {mode} | {batch}", n_all, go, rows))
    return found


def attempt(way: Way, work: Callable[[], Any], device: str) -> Any:
    """Run, and wait for the device; an error is kept in the row."""
    if way.error:
        return None
    try:
        value = work()
        if device != "cpu":
            torch.cuda.synchronize()
        return value
    except Exception as error:  # whatever a variant stumbles over, the others are still measured
        way.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:90]
        gc.collect()
        return None


def compare(found: list[Way], hf: LlamaForCausalLM, ours: Ours, layer: int, device: str) -> None:
    """Each way's rows against float32 and against Hugging Face's; this also warms up (and compiles)."""
    family = ours.lean._family
    assert isinstance(family, Rotary)
    exactly = exact(family, ours.lean._homes, ours.tokens[:2], [ours.site])[ours.site]
    for way in found:
        if way.rows is None:
            continue
        started = time.perf_counter()
        rows = attempt(way, way.rows, device)
        if rows is None:
            continue
        truth = hf_early_stop(hf, ours.tokens[: len(rows)], layer).to(rows.device)
        way.apart = row_difference(rows[:2], exactly.to(rows.device))
        way.largest = float((rows.float() - truth.float()).abs().max())
        print(f"  checked {way.name} in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def measure(found: list[Way], rounds: int, device: str, limit: float) -> None:
    """Best seconds of each way over interleaved rounds, as many as `limit` seconds allow (one at least)."""
    started = time.perf_counter()
    for number in range(rounds + 1):  # the first round warms up and rarely wins
        if number > 1 and time.perf_counter() - started > limit:
            break
        for way in found:
            began = time.perf_counter()
            attempt(way, way.go, device)
            if not way.error:
                way.seconds = min(way.seconds, time.perf_counter() - began)


def through_bridge(hf: LlamaForCausalLM, ours: Ours, layer: int, batch: int, device: str) -> Way:
    """TransformerLens on the same weights; it comes last, since it changes the model that it wraps."""
    tokens, site = ours.tokens[:batch], ours.site
    bridge: list[Any] = []

    def go() -> torch.Tensor:
        if not bridge:
            bridge.append(wrap(hf, device, next(hf.parameters()).dtype))
        _, cache = bridge[0].run_with_cache(
            tokens, names_filter=site, stop_at_layer=layer + 1, use_cache=False, output_attentions=False
        )
        return cache[site]

    truth = hf_early_stop(hf, tokens, layer)
    exactly = exact(ours.lean._family, ours.lean._homes, tokens[:2], [site])[site]  # type: ignore[arg-type]
    way = Way(f"TransformerLens bridge | {batch}", tokens.numel(), go)
    rows = attempt(way, go, device)
    if rows is not None:
        way.apart, way.largest = row_difference(rows[:2], exactly), float((rows.float() - truth.float()).abs().max())
    return way


def wrap(hf: LlamaForCausalLM, device: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge around `hf`. It wants a tokenizer that it can load again from disk."""
    from tokenizers import ByteLevelBPETokenizer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = ByteLevelBPETokenizer()._tokenizer
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
        hf.config.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(
            "llama", hf_model=hf, tokenizer=tokenizer, device=device, dtype=dtype
        )


def report(found: list[Way], title: str) -> None:
    """Print tokens a second, time against the best floor, speed against Hugging Face's best, and differences."""
    rates = {way.name: way.tokens / way.seconds for way in found if not way.error}
    best_floor = max((r for name, r in rates.items() if name.startswith("floor")), default=float("nan"))
    best_hf = max((r for name, r in rates.items() if name.startswith("Hugging Face, hook")), default=float("nan"))
    print(title)
    print(f"{'way | windows a pass':48}{'tok/s':>10}{'x floor':>9}{'x HF':>7}{'to fp32':>10}{'to HF':>10}")
    own = [way.apart for way in found if way.name.startswith("Hugging Face, hook") and way.apart is not None]
    tolerance = max(1.25 * max(own, default=0.0), ROW_TOLERANCE[torch.float32])
    for way in found:
        if way.error:
            print(f"{way.name:48}{way.error}")
            continue
        rate = rates[way.name]
        apart = "" if way.apart is None else f"{way.apart:.1e}" + ("" if way.apart <= tolerance else "!")
        largest = "" if way.largest is None else f"{way.largest:.1e}"
        print(f"{way.name:48}{rate:>10,.0f}{best_floor / rate:>9.2f}{rate / best_hf:>7.2f}{apart:>10}{largest:>10}")


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, action="append", help="windows a pass (repeatable; default 16 and auto)")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=0, help="windows of a shard (default 256, on the CPU 16)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=90, help="stop starting rounds after this many")
    parser.add_argument("--bridge", action="store_true", help="measure TransformerLens too")
    args = parser.parse_args()
    dtype = torch.float32 if args.shape == "small" else torch.bfloat16
    cuda = args.device.startswith("cuda")
    hf = build(args.shape, args.device, dtype)
    layer = hf.config.num_hidden_layers // 2
    windows = args.windows or (256 if cuda else 16)
    tokens = torch.randint(2, hf.config.vocab_size, (windows, args.window), device=args.device)
    stored = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        ours = Ours(hf, f"blocks.{layer}.hook_resid_post", tokens, stored)
        auto = auto_batch(ours.lean.device, args.window)
        batches = [min(b, windows) for b in args.batch or dict.fromkeys((16, auto))]
        found = ways(hf, ours, layer, batches)
        compare(found, hf, ours, layer, args.device)
        measure(found, args.rounds, args.device, args.seconds)
        disk = Way(
            f"greatctl shards on disk, compiled | {auto}",
            SHARDS * tokens.numel(),
            partial(ours.written, MODES[-1], auto),
        )
        measure([disk], 1, args.device, args.seconds)
        found.append(disk)
        if args.bridge:
            bridge = through_bridge(hf, ours, layer, batches[0], args.device)
            measure([bridge], args.rounds, args.device, args.seconds / 3)
            found.append(bridge)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    report(found, f"{args.shape}, {stored}, block {layer}, {name}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
