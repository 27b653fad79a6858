"""How fast is a resid_pre sweep? Floor, TransformerLens and greatctl, side by side on one random Llama in
one run.

    python tests/benchmarks/patch_sweep.py
    python tests/benchmarks/patch_sweep.py --device cuda --layers 32 --d-model 4096 --d-mlp 14336 --heads 32 \
        --kv-heads 8 --vocabulary 128256 --once

The two prompts differ in every token, so no cell can be skipped. The floor is the matrix products alone
that the cells
need: for a patch at position p of layer L only tokens from p on and blocks from L on, and one unembedded
    token a cell.
TransformerLens runs its own `get_act_patch_resid_pre`, one forward a cell. Times are the best of three,
except with --once.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.patching.metrics import LogitDiff
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.runs import prepare
from greatctl.patching.sweep import sweep_layer

os.environ.setdefault("TQDM_DISABLE", "1")  # the peer draws a bar of its own


def main() -> None:
    """Print one table: seconds, milliseconds a cell, ratio to ours, largest difference."""
    args = arguments()
    torch.manual_seed(0)
    model = random_llama(args)
    ids = torch.randperm(args.vocabulary)[: 2 * args.positions + 2].tolist()
    p = args.positions
    pair = EncodedPair(Pair("bench", "", "", "", ""), tuple(ids[:p]), tuple(ids[p : 2 * p]), ids[-1], ids[-2])
    rows: dict[str, tuple[float, torch.Tensor | None]] = {}
    with torch.no_grad():
        rows["floor (products alone)"] = timed(args, lambda: floor(model, args))
        rows["greatctl"] = timed(args, lambda: ours(model, pair, args))
        rows["TransformerLens"] = timed(args, lambda: theirs(copy.deepcopy(model), pair, args))
    cells = args.layers * p
    print(f"resid_pre, {args.layers} layers x {p} positions = {cells} cells, d_model {args.d_model}, ", end="")
    print(f"{args.dtype}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':24}{'seconds':>10}{'ms/cell':>10}{'x ours':>10}{'largest difference':>22}")
    mine, table = rows["greatctl"]
    for name, (seconds, found) in rows.items():
        apart = "" if found is None or table is None else f"{float((found - table).abs().max()):.1e}"
        print(f"{name:24}{seconds:>10.3f}{1000 * seconds / cells:>10.2f}{seconds / mine:>10.2f}{apart:>22}")


def arguments() -> argparse.Namespace:
    """The shape; the default is the small CPU case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 8, "positions": 24, "d_model": 256, "d_mlp": 688, "heads": 8, "kv_heads": 2}
    for name, default in {**sizes, "vocabulary": 4096, "batch_cells": 64}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--once", action="store_true", help="no repetitions (large shapes)")
    return parser.parse_args()


def random_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of that shape, random, frozen, made on its device."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.d_model,
        intermediate_size=args.d_mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.positions,
        initializer_range=0.05,
        dtype=getattr(torch, args.dtype),
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, args.dtype)).eval().requires_grad_(False)


def timed(args: argparse.Namespace, work: Callable[[], object]) -> tuple[float, torch.Tensor | None]:
    """(best seconds, table); `work` may return (seconds, table) where only a part of it counts."""
    best, table = float("inf"), None
    for _ in range(1 if args.once else 3):
        synchronise(args)
        start = time.perf_counter()
        found = work()
        synchronise(args)
        seconds = time.perf_counter() - start
        if isinstance(found, tuple):
            seconds, table = found
        best = min(best, seconds)
    return best, table


def synchronise(args: argparse.Namespace) -> None:
    """Wait for the device."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def floor(model: LlamaForCausalLM, args: argparse.Namespace) -> None:
    """The products of every block for the tokens at and after the patch, and of the head; nothing else."""
    tokens = args.positions * (args.positions + 1) // 2
    kind = {"device": args.device, "dtype": model.dtype}
    products = {
        weight.shape[1]: torch.randn(tokens, weight.shape[1], **kind)
        for weight in model.model.layers[0].parameters()
        if weight.ndim == 2
    }
    last = torch.randn(args.positions, args.d_model, **kind)
    for first in range(args.layers):
        for block in model.model.layers[first:]:
            for weight in block.parameters():
                if weight.ndim == 2:
                    torch.nn.functional.linear(products[weight.shape[1]], weight)
        model.lm_head(last)


def ours(model: LlamaForCausalLM, pair: EncodedPair, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """The whole sweep with its self-checks, both unpatched runs included."""
    facts = ModelInfo("random", "0", "llama", args.layers, args.d_model, args.vocabulary, 10**6, args.dtype)
    frozen = LeanModel(model, facts, None, [])
    metrics = {"logit-diff": LogitDiff()}
    start = time.perf_counter()
    group = prepare(frozen, [pair], "resid_pre")
    rows = [
        sweep_layer(frozen, group, layer, "denoising", metrics, args.batch_cells)["logit-diff"][0]
        for layer in range(args.layers)
    ]
    return time.perf_counter() - start, torch.stack(rows)


def theirs(model: LlamaForCausalLM, pair: EncodedPair, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """TransformerLens on a copy, which it wraps in place; the wrapping is not counted."""
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    words = Tokenizer(WordLevel({"<s>": 0}, "<s>"))
    with tempfile.TemporaryDirectory() as folder:  # it loads a tokenizer again from disk, though only ids are passed
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            "random", hf_model=model, tokenizer=tokenizer, device=args.device, dtype=model.dtype
        )
    clean, corrupted = (torch.tensor([ids], device=args.device) for ids in (pair.clean_ids, pair.corrupted_ids))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[0, -1, pair.answer_id] - logits[0, -1, pair.wrong_answer_id]).float()

    start = time.perf_counter()
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(args.layers)]
    _, cache = bridge.run_with_cache(clean, names_filter=names, use_cache=False, output_attentions=False)
    table = patching.get_act_patch_resid_pre(bridge, corrupted, cache, metric)
    synchronise(args)
    return time.perf_counter() - start, table.double().cpu()


if __name__ == "__main__":
    main()
