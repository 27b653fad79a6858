"""What exact edges and masked runs cost, on one random Llama: seconds and peak memory, self-checks included.

    python tests/benchmarks/edges.py                        # CPU: 4 layers, d_model 128, 4 pairs of 16 tokens
    python tests/benchmarks/edges.py --shape llama3-8b      # CUDA: 32 layers, 24 pairs of 32 tokens, bfloat16

Node sets and edge sets are random; the edge sets are a small circuit, a tenth and half of all edges. For exact edges
all senders into some inputs (the key of a head in the middle, its MLP, the logits) are patched, and what all edges of
the model would take is estimated from the rate there.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from patch_sweep import SHAPES, device_name, random_llama, synchronise

from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.patching.edges import EdgeSweep
from greatctl.patching.graph import graph
from greatctl.patching.masked import MaskedRuns
from greatctl.patching.metrics import LogitDiff
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.writes import edge_group

METRICS = {"logit-diff": LogitDiff()}
SMALL = {**SHAPES["cpu"], "layers": 4, "d_model": 128, "d_mlp": 344}


def main() -> None:
    """Print a line for each kind of run."""
    args = arguments()
    torch.manual_seed(0)
    hf = random_llama(args)
    info = ModelInfo("bench", "0", "llama", args.layers, args.d_model, args.vocabulary, 512, args.dtype)
    model = LeanModel(hf, info, None, [])
    print(f"{args.layers} layers, d_model {args.d_model}, {args.dtype}, {device_name(args)}, torch {torch.__version__}")
    made = [pair(args, seed) for seed in range(args.pairs)]
    whole = graph(model)
    group = timed(f"both runs of {args.pairs} pairs of {args.positions}", args, lambda: edge_group(model, made))
    runs = timed("masked runs: both ends kept and checked", args, lambda: MaskedRuns(model, group, said=print))
    some = [[node for node in whole.senders if random.random() < 0.5] for _ in range(10)]
    timed("10 sets of nodes", args, lambda runs=runs: runs.effects(some, METRICS))
    edges = list(whole.edges)
    for n in (min(100, len(edges) // 20), len(edges) // 10, len(edges) // 2):
        chosen = random.sample(edges, n)
        timed(f"1 set of {n} edges", args, lambda runs=runs, chosen=chosen: runs.effects([chosen], METRICS))
    del runs
    middle = args.layers // 2
    for name in (f"a{middle}.kv0.k", f"m{middle}.in", "logits.in"):
        sweep = EdgeSweep(
            model, group, METRICS, "denoising", edges=whole.select([f"*->{name}"]), batch=args.batch, said=print
        )
        (step,) = sweep.steps
        begun = time.perf_counter()
        timed(f"{len(step.edges)} exact edges into {name}", args, lambda sweep=sweep, step=step: sweep.run(step))
        rate = len(step.edges) / (time.perf_counter() - begun)
        minutes = len(edges) / rate / 60
        print(f"  {rate:.1f} edges a second of {args.pairs} pairs; all {len(edges)} at that rate {minutes:.0f} min")


def timed(what: str, args: argparse.Namespace, work: Callable[[], Any]) -> Any:
    """Do it, and say how long it took and how much memory its largest moment held."""
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    result = work()
    synchronise(args)
    peak = f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device.startswith("cuda") else ""
    print(f"{what:50}{time.perf_counter() - begun:>9.2f} s{peak}", flush=True)
    return result


def pair(args: argparse.Namespace, seed: int) -> EncodedPair:
    """Two prompts that share their first token alone."""
    p = args.positions
    ids = torch.randperm(args.vocabulary, generator=torch.Generator().manual_seed(seed))[: 2 * p + 1].tolist()
    other = (ids[0], *ids[p : 2 * p - 1])
    return EncodedPair(Pair(f"b{seed}", "a", "b", "c", "d"), tuple(ids[:p]), other, ids[-1], ids[-2])


def arguments() -> argparse.Namespace:
    """The shape; the default is the small CPU case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--positions", type=int)
    parser.add_argument("--batch", type=int, help="tasks at once (default: what greatctl would take)")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    large = args.shape != "cpu"
    defaults = {**(SHAPES[args.shape] if large else SMALL), "device": "cuda" if large else "cpu"}
    defaults |= {"dtype": "bfloat16" if large else "float32", "pairs": 24 if large else 4}
    defaults["positions"] = 32 if large else 16
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
