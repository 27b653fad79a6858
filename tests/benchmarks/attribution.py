"""What does a gradient for every node and every edge cost? Floor, greatctl and TransformerLens, side by side on one
random Llama in one run.

    python tests/benchmarks/attribution.py                                   # CPU: 4 layers, d_model 128, 4 pairs of 16 tokens
    python tests/benchmarks/attribution.py --shape llama3-8b                 # CUDA: 24 pairs of 32 tokens, bfloat16
    python tests/benchmarks/attribution.py --shape llama3-8b --pairs 1 --positions 300 --quick

The floor is what attribution patching needs at least: two forwards of the plain Hugging Face model and one way back,
with respect to its input embedding. Nodes are every head, MLP and the embedding; edges are all of them (they bring
the nodes along). EAP-IG takes --steps points. Peak memory is what PyTorch allocated at most (CUDA), weights included.
TransformerLens runs its own attribution patching where it can, on the same weights; what it refuses (edges of
grouped-query models: try --kv-heads 8) is printed, and in float32 how far its scores are from ours. Rows that fail print
why, and the others go on. With --quick every row runs twice, the first time to warm the device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from patch_sweep import SHAPES as SWEEP_SHAPES
from patch_sweep import bridged, device_name, random_llama, synchronise
from transformers import LlamaForCausalLM

from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.patching.attribution import node_scores
from greatctl.patching.edge_attribution import GraphScores, edge_scores
from greatctl.patching.graph import graph
from greatctl.patching.metrics import LogitDiff
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.runs import prepare

ANSWER, WRONG = 1, 2
DIFF = {"logit-diff": LogitDiff()}
CPU = {"layers": 4, "positions": 16, "d_model": 128, "d_mlp": 344, "heads": 8, "kv_heads": 2, "vocabulary": 1024}
SHAPES = {"cpu": CPU, "llama3-8b": {**SWEEP_SHAPES["llama3-8b"], "positions": 32}}


@dataclass
class Row:
    """One line: seconds, peak bytes (0 where not measured), or why there are none."""

    name: str
    seconds: float | None
    peak: int
    remark: str = ""
    result: Any = None


def main() -> None:
    """Print the table."""
    args = arguments()
    torch.manual_seed(0)
    hf = random_llama(args)
    facts = ModelInfo("random", "0", "llama", args.layers, args.d_model, args.vocabulary, 512, args.dtype)
    model, pairs = LeanModel(hf, facts, None, []), random_pairs(args)
    sizes = graph(model)
    print(
        f"{args.pairs} pairs of {args.positions} tokens, {args.layers} layers, d_model {args.d_model}, {args.dtype}, "
        f"{device_name(args)}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{len(sizes.senders):,} nodes, {sizes.n_edges:,} edges"
    )
    rows = [timed("floor (2 forwards, 1 backward)", args, lambda: floor(hf, pairs, args))]
    show(rows[0], rows[0])
    for name, work in ours(model, pairs, args):
        rows.append(timed(name, args, work))
        show(rows[-1], rows[0])
    if not args.no_peer:
        mine = edge_scores(model, pairs, DIFF) if args.dtype == "float32" else None
        for name, work in theirs(hf, pairs, args):
            found = timed(name, args, work)
            if found.result is not None and mine is not None:
                found.remark = apart(mine, found.result)
            show(found, rows[0])


def ours(
    model: LeanModel, pairs: list[EncodedPair], args: argparse.Namespace
) -> list[tuple[str, Callable[[], object]]]:
    """greatctl's rows."""

    def nodes(site: str, method: str) -> Callable[[], object]:
        return lambda: node_scores(model, prepare(model, pairs, site), DIFF, method=method, steps=args.steps)

    def edges(method: str) -> Callable[[], object]:
        return lambda: edge_scores(model, pairs, DIFF, method=method, steps=args.steps)

    rows = [
        ("AtP, heads (z)", nodes("z", "attribution")),
        ("AtP, stream (resid_pre)", nodes("resid_pre", "attribution")),
        ("AtP with QK-fix, keys", nodes("k", "attribution-qk")),
        ("AtP* with dropped blocks, heads", nodes("z", "attribution-drop")),
        (f"EAP-IG {args.steps} steps, heads (z)", nodes("z", "eap-ig")),
        ("AtP, all nodes and edges", edges("attribution")),
        (f"EAP-IG {args.steps} steps, all nodes and edges", edges("eap-ig")),
    ]
    return rows if args.quick else [*rows, ("AtP with QK-fix, all edges", edges("attribution-qk"))]


def floor(hf: LlamaForCausalLM, pairs: list[EncodedPair], args: argparse.Namespace) -> None:
    """Two forwards and one way back of the model as it is."""
    clean, corrupted = (
        torch.tensor([getattr(pair, name) for pair in pairs], device=args.device)
        for name in ("clean_ids", "corrupted_ids")
    )
    with torch.no_grad():
        hf(clean, use_cache=False, logits_to_keep=1)
    words = hf.get_input_embeddings()(corrupted).detach().requires_grad_()
    logits = hf(inputs_embeds=words, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    (logits[:, ANSWER] - logits[:, WRONG]).sum().backward()


def theirs(
    hf: LlamaForCausalLM, pairs: list[EncodedPair], args: argparse.Namespace
) -> list[tuple[str, Callable[[], object]]]:
    """TransformerLens's rows, by its own `attribution_patch`, which takes pairs one by one and averages over them. It
    wraps the model in place, so it comes last, and the wrapping is not counted."""
    try:
        from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

        hf.get_input_embeddings().requires_grad_(True)  # its backward needs a parameter to begin with; one is cheapest
        bridge = bridged(hf, args)
    except Exception as error:  # a peer that is absent must not take the table with it
        print(f"TransformerLens: not run: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return []
    clean, corrupted = (
        torch.tensor([getattr(pair, name) for pair in pairs], device=args.device)
        for name in ("clean_ids", "corrupted_ids")
    )

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[0, -1, ANSWER] - logits[0, -1, WRONG]).float()

    def run(granularity: str) -> Callable[[], object]:
        return lambda: attribution_patch(bridge, clean, corrupted, metric, EdgeAttributionConfig(granularity))

    return [("TransformerLens, nodes", run("node")), ("TransformerLens, edges", run("edge"))]


def apart(mine: GraphScores, found: Any) -> str:
    """The largest difference of its node and edge scores from ours, relative to the largest of ours."""
    ours = dict(zip((n.name for n in mine.graph.senders), mine.nodes["logit-diff"].mean(0).tolist(), strict=True))
    nodes: dict[str, float] = {}
    for node, value in found.node_scores.items():  # one for each position; ours are of all together
        nodes[_our_name(node)] = nodes.get(_our_name(node), 0.0) + value
    off = max(abs(nodes[name] - ours[name]) for name in nodes)
    words = f"{len(nodes)} nodes differ by at most {off / max(map(abs, ours.values())):.1e} of the largest"
    if getattr(found, "edge_scores", None):
        ours = dict(
            zip((e.name for e in mine.graph.edges), mine.edges["logit-diff"][:, :, 0].mean(0).tolist(), strict=True)
        )
        edges: dict[str, float] = {}
        for (sender, receiver), value in found.edge_scores.items():
            name = f"{_our_name(sender)}->{_our_name(receiver)}"
            edges[name] = edges.get(name, 0.0) + value
        off = max(abs(edges[name] - ours[name]) for name in edges)
        words += f", {len(edges):,} edges by {off / max(map(abs, ours.values())):.1e}"
    return words


def _our_name(node: Any) -> str:
    layer, head = node.layer, node.head
    return {
        "embed": "embed",
        "attn_head_out": f"a{layer}.h{head}",
        "mlp_out": f"m{layer}",
        "q_input": f"a{layer}.h{head}.q",
        "k_input": f"a{layer}.kv{head}.k",
        "v_input": f"a{layer}.kv{head}.v",
        "mlp_in": f"m{layer}.in",
        "logits": "logits.in",
    }[node.kind]


def timed(name: str, args: argparse.Namespace, work: Callable[[], object]) -> Row:
    """Best of the repeats."""
    cuda, best = args.device.startswith("cuda"), float("inf")
    try:
        for _ in range(args.repeats):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            synchronise(args)
            start = time.perf_counter()
            result = work()
            synchronise(args)
            best = min(best, time.perf_counter() - start)
    except Exception as error:  # one row that fails must not take the others with it
        words = f"{error} {getattr(error, 'why', '') or ''}".strip().splitlines()
        return Row(name, None, 0, f"not run: {type(error).__name__}: {(words or [''])[0][:160]}")
    return Row(name, best, torch.cuda.max_memory_allocated() if cuda else 0, "", result)


def show(row: Row, least: Row) -> None:
    """One line of the table, at once."""
    if row.seconds is None:
        print(f"{row.name:42}  {row.remark}", flush=True)
        return
    ratio = f"{row.seconds / least.seconds:>8.2f} x floor" if least.seconds else ""
    peak = f"{row.peak / 2**30:>8.1f} GiB" if row.peak else ""
    print(f"{row.name:42}{row.seconds:>10.3f} s{ratio}{peak}  {row.remark}".rstrip(), flush=True)


def random_pairs(args: argparse.Namespace) -> list[EncodedPair]:
    """Pairs that share no token at any place, so that nothing can be skipped."""
    found = []
    for number in range(args.pairs):
        clean = torch.randint(args.vocabulary - 1, (args.positions,))
        corrupted = (clean + 1 + torch.randint(args.vocabulary - 2, (args.positions,))) % args.vocabulary
        texts = Pair(f"bench{number}", "a", "b", "c", "d")
        found.append(EncodedPair(texts, tuple(clean.tolist()), tuple(corrupted.tolist()), ANSWER, WRONG))
    return found


def arguments() -> argparse.Namespace:
    """The shape; the default is the small CPU case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu")
    for name in CPU:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two runs a row, and leave out the slowest row")
    parser.add_argument("--no-peer", action="store_true", help="leave out TransformerLens")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    large = args.shape != "cpu"
    defaults = {
        **SHAPES[args.shape],
        "pairs": 24 if large else 4,
        "device": "cuda" if large else "cpu",
        "dtype": "bfloat16" if large else "float32",
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.repeats = 2 if args.quick else args.repeats
    return args


if __name__ == "__main__":
    main()
