"""Residual stream of the middle block: what the arithmetic needs, what peers take, what greatctl takes.

    python tests/benchmarks/harvest.py                                     # CPU, 8 layers, d_model 256
    python tests/benchmarks/harvest.py --shape llama3-8b --device cuda     # one GPU, random weights, bf16

Floor: the products of the needed blocks and their attention alone, on tensors of the same shapes. Peers:
Hugging Face with every hidden state, Hugging Face with a hook and an early stop, TransformerLens where it is
installed. Ours: the lean engine, and the whole inner loop of the stage (float64 statistics, rows on the CPU).
Rounds are interleaved and the best one of each counts, so that a busy machine disturbs all alike. The largest
difference to Hugging Face stands beside.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.model.reading import read

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


class _Stop(Exception):
    """Ends the peer's forward at the hook."""


def build(shape: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama of the shape, in eval mode."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1024)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        hf = LlamaForCausalLM(config)
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
    qkv, out = (
        new(config.hidden_size + 2 * kv, config.hidden_size),
        new(config.hidden_size, config.hidden_size),
    )
    up, down = (
        new(2 * config.intermediate_size, config.hidden_size),
        new(config.hidden_size, config.intermediate_size),
    )
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


def best(ways: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Best seconds of each way over interleaved rounds."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):  # the first round warms up and rarely wins
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device != "cpu":
                torch.cuda.synchronize()
            found[name] = min(found[name], time.perf_counter() - started)
    return found


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dtype = torch.float32 if args.shape == "small" else torch.bfloat16
    hf = build(args.shape, args.device, dtype)
    config = hf.config
    layer = config.num_hidden_layers // 2
    site = f"blocks.{layer}.hook_resid_post"
    tokens = torch.randint(2, config.vocab_size, (args.batch, args.window), device=args.device)
    info = ModelInfo(
        args.shape,
        "",
        "llama",
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        1024,
        str(dtype),
    )
    lean = LeanModel(hf, info, None, [0, 1])
    ids, length = tokens.int().cpu(), torch.full((args.batch,), args.window, dtype=torch.int32)
    stored = str(dtype).removeprefix("torch.")
    ways: dict[str, Callable[[], Any]] = {
        "floor: products and attention": floor(hf, layer + 1, args.batch, args.window),
        "Hugging Face, all hidden states": lambda: hf_all_states(hf, tokens, layer),
        "Hugging Face, hook and early stop": lambda: hf_early_stop(hf, tokens, layer),
        "greatctl, lean capture": lambda: lean.capture(tokens, [site])[site],
        "greatctl, rows and statistics": lambda: read(
            lean, ids, length, range(args.batch), [site], dtype=stored, batch_size=args.batch
        ),
    }
    with torch.inference_mode():
        truth = hf_all_states(hf, tokens, layer)
        apart = {"greatctl, lean capture": float((lean.capture(tokens, [site])[site] - truth).abs().max())}
        times = best(ways, args.rounds, args.device)
        if importlib.util.find_spec("transformer_lens"):  # last, since it changes the model that it wraps
            bridge = wrap(hf, args.device, dtype)

            def through_bridge() -> torch.Tensor:
                _, cache = bridge.run_with_cache(
                    tokens,
                    names_filter=site,
                    stop_at_layer=layer + 1,
                    use_cache=False,
                    output_attentions=False,
                )
                return cache[site]

            apart["TransformerLens bridge"] = float((through_bridge() - truth).abs().max())
            times |= best({"TransformerLens bridge": through_bridge}, args.rounds, args.device)
    report(times, apart, args.batch * args.window, f"{args.shape} {stored} {args.device} block {layer}")


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


def report(times: dict[str, float], apart: dict[str, float], tokens: int, title: str) -> None:
    """Print tokens a second, the ratio to the floor, ours against each, and differences."""
    low = times["floor: products and attention"]
    ours = times["greatctl, rows and statistics"]
    print(f"{title}, {tokens} tokens a batch, {torch.get_num_threads()} threads")
    print(f"{'':36}{'tok/s':>10}{'x floor':>9}{'ours is':>10}{'max diff':>11}")
    for name, seconds in times.items():
        speed, diff = f"{tokens / seconds:,.0f}", f"{apart[name]:.1e}" if name in apart else ""
        print(f"{name:36}{speed:>10}{seconds / low:>9.2f}{seconds / ours:>9.2f}x{diff:>11}")


if __name__ == "__main__":
    main()
