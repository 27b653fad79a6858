"""How fast is a resid_pre sweep? Floor, one plain forward a cell, TransformerLens and greatctl, side by side on
one random Llama in one run.

    python tests/benchmarks/patch_sweep.py                        # CPU: 8 layers x 24 positions, d_model 256
    python tests/benchmarks/patch_sweep.py --shape llama3-8b      # CUDA: 32 x 24, bfloat16, weights made on the GPU

The two prompts differ in every token, so no cell can be skipped. The floor is the matrix products alone that
the cells need: for a patch at position p of layer L only tokens from p on and blocks from L on, and one
unembedded token a cell. TransformerLens runs its own `get_act_patch_resid_pre`, one forward a cell; with
--layers-timed N the slow rows run N layers only and their time is multiplied, which the table says. On CUDA
the differences are taken in float32 on a narrower model of the same depth. A row that cannot run (a library
that is not there) prints why, and the others go on. Times are the best of three.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("TQDM_DISABLE", "1")  # the peer draws a bar of its own, and reads this when imported

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.patching.checks import check_batch, check_layers
from greatctl.patching.memory import auto_cells, overhead_of
from greatctl.patching.metrics import LogitDiff
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.runs import prepare
from greatctl.patching.sweep import Sweep

SHAPES = {
    "cpu": {"layers": 8, "positions": 24, "d_model": 256, "d_mlp": 688, "heads": 8, "kv_heads": 2, "vocabulary": 4096},
    "llama3-8b": {
        "layers": 32,
        "positions": 24,
        "d_model": 4096,
        "d_mlp": 14336,
        "heads": 32,
        "kv_heads": 8,
        "vocabulary": 128256,
    },
}
NARROW = {"d_model": 512, "d_mlp": 1376, "heads": 8, "kv_heads": 2, "vocabulary": 8192}


@dataclass
class Row:
    """One line of the table: seconds for the whole sweep, what it found [layers timed, positions], a remark."""

    name: str
    seconds: float | None
    found: torch.Tensor | None
    remark: str = ""


def main() -> None:
    """Print the table of times, and the largest differences."""
    args = arguments()
    torch.manual_seed(0)
    print(
        f"resid_pre, {args.layers} layers x {args.positions} positions = {args.layers * args.positions} cells, ", end=""
    )
    print(
        f"d_model {args.d_model}, {args.dtype}, {device_name(args)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    model, pair = random_llama(args), random_pair(args)
    rows = times(model, pair, args, compare=args.shape == "cpu")
    show(rows, args)
    if args.shape != "cpu":
        del model
        narrow = argparse.Namespace(**{**vars(args), **NARROW, "dtype": "float32", "repeats": 1, "layers_timed": 4})
        print(f"\nthe same depth in float32, d_model {narrow.d_model}: largest differences from greatctl")
        small, other = random_llama(narrow), random_pair(narrow)
        show(times(small, other, narrow, compare=True), narrow)


def times(model: LlamaForCausalLM, pair: EncodedPair, args: argparse.Namespace, *, compare: bool) -> list[Row]:
    """All rows; the peer comes last, since it wraps the model in place."""
    rows = [
        timed("floor (products alone)", args, lambda: floor(model, args)),
        timed("greatctl", args, lambda: ours(model, pair, args)),
        timed("greatctl, batch of 1", args, lambda: ours(model, pair, args, batch_cells=1)) if compare else None,
        timed("one forward a cell", args, lambda: one_by_one(model, pair, args), slow=True),
        timed("TransformerLens", args, lambda: theirs(model, pair, args), slow=True),
    ]
    return [row for row in rows if row is not None]


def timed(name: str, args: argparse.Namespace, work: Callable[[], object], *, slow: bool = False) -> Row:
    """Best of the repeats; a slow row runs once, over `layers_timed` layers, and is multiplied."""
    best, found = float("inf"), None
    try:
        for _ in range(1 if slow and args.shape != "cpu" else args.repeats):
            synchronise(args)
            start = time.perf_counter()
            result = work()
            synchronise(args)
            seconds = time.perf_counter() - start
            if isinstance(result, tuple):
                seconds, found = result
            best = min(best, seconds)
    except Exception as error:  # a peer that is absent or broken must not take the other rows with it
        return Row(
            name,
            None,
            None,
            f"not run: {type(error).__name__}: {(str(error) + ' ' + getattr(error, 'why', ''))[:160]}",
        )
    if slow and args.layers_timed < args.layers:
        return Row(name, best * args.layers / args.layers_timed, found, f"{args.layers_timed} layers timed, multiplied")
    return Row(name, best, found)


def show(rows: list[Row], args: argparse.Namespace) -> None:
    """The table."""
    cells = args.layers * args.positions
    mine = next(row for row in rows if row.name == "greatctl")
    print(f"{'':24}{'seconds':>10}{'ms/cell':>10}{'x ours':>10}{'largest difference':>20}")
    for row in rows:
        if row.seconds is None:
            print(f"{row.name:24}  {row.remark}")
            continue
        apart = ""
        if row.found is not None and mine.found is not None:
            n = min(len(row.found), len(mine.found))
            apart = f"{float((row.found[:n] - mine.found[:n]).abs().max()):.1e}"
        ratio = row.seconds / mine.seconds if mine.seconds else float("nan")
        print(
            f"{row.name:24}{row.seconds:>10.3f}{1000 * row.seconds / cells:>10.2f}{ratio:>10.2f}{apart:>20}  {row.remark}"
        )
    if args.device.startswith("cuda"):
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def arguments() -> argparse.Namespace:
    """The shape; the default is the small CPU case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu")
    for name in SHAPES["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--batch-cells", type=int, help="cells a batch (default: what greatctl would take)")
    parser.add_argument("--overhead", type=int, help="what a batch costs besides its tokens, in tokens")
    parser.add_argument("--layers-timed", type=int, help="layers of the slow rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    large = args.shape != "cpu"
    defaults = {**SHAPES[args.shape], "device": "cuda" if large else "cpu", "dtype": "bfloat16" if large else "float32"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.layers_timed = args.layers_timed or (2 if large else args.layers)
    return args


def random_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of that shape, random, frozen, made on its device in its dtype."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.d_model,
        intermediate_size=args.d_mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=512,
        initializer_range=0.05 if args.d_model < 4096 else 0.02,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_pair(args: argparse.Namespace) -> EncodedPair:
    """Two prompts that share no token."""
    p = args.positions
    ids = torch.randperm(args.vocabulary)[: 2 * p + 2].tolist()
    return EncodedPair(Pair("bench", "a", "b", "c", "d"), tuple(ids[:p]), tuple(ids[p : 2 * p]), ids[-1], ids[-2])


def synchronise(args: argparse.Namespace) -> None:
    """Wait for the device."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def device_name(args: argparse.Namespace) -> str:
    """What it runs on."""
    return torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device


@torch.no_grad()
def floor(model: LlamaForCausalLM, args: argparse.Namespace) -> None:
    """The products of every block for the tokens at and after the patch, and of the head; nothing else."""
    tokens = args.positions * (args.positions + 1) // 2
    kind = {"device": args.device, "dtype": model.dtype}
    block = model.model.layers[0]
    weights = [weight for weight in block.parameters() if weight.ndim == 2]
    products = {weight.shape[1]: torch.randn(tokens, weight.shape[1], **kind) for weight in weights}
    last = torch.randn(args.positions, args.d_model, **kind)
    for first in range(args.layers):
        for block in model.model.layers[first:]:
            for weight in block.parameters():
                if weight.ndim == 2:
                    torch.nn.functional.linear(products[weight.shape[1]], weight)
        model.lm_head(last)


def ours(
    model: LlamaForCausalLM, pair: EncodedPair, args: argparse.Namespace, *, batch_cells: int | None = None
) -> tuple[float, torch.Tensor]:
    """The whole sweep with its self-checks, both unpatched runs included."""
    facts = ModelInfo("random", "0", "llama", args.layers, args.d_model, args.vocabulary, 512, args.dtype)
    frozen = LeanModel(model, facts, None, [])
    start = time.perf_counter()
    group = prepare(frozen, [pair], "resid_pre")
    sweep = Sweep(frozen, group, "denoising", {"logit-diff": LogitDiff()})
    overhead = overhead_of(args.device) if args.overhead is None else args.overhead
    steps = [(layer,) for layer in range(args.layers)]
    cells = batch_cells or args.batch_cells or auto_cells(frozen, args.positions)
    room = max(1, min(len(steps), cells // args.positions))
    room = -(-len(steps) // -(-len(steps) // room))  # as even as possible
    table = torch.stack([sweep.table(1)["logit-diff"][0, 0] for _ in steps])
    for first in range(0, len(steps), room):
        together = steps[first : first + room]
        check_layers(sweep, [layer for (layer,) in together])
        n = len(together)
        for number, batch in enumerate(sweep.batches([-1], max(1, cells // n), max(1, 2 * overhead // n))):
            if first == number == 0:
                check_batch(sweep, together[0], batch)
            for at, found in enumerate(sweep.run(together, batch)):
                table[first + at, list(batch.places)] = found["logit-diff"]
    synchronise(args)
    return time.perf_counter() - start, table


@torch.no_grad()
def one_by_one(model: LlamaForCausalLM, pair: EncodedPair, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """The Hugging Face model itself, one forward with one hook a cell."""
    clean, corrupted = (torch.tensor([ids], device=args.device) for ids in (pair.clean_ids, pair.corrupted_ids))
    start = time.perf_counter()
    states = model.model(clean, output_hidden_states=True, use_cache=False).hidden_states
    table = torch.zeros(args.layers_timed, args.positions, dtype=torch.float64)
    for layer in range(args.layers_timed):
        for at in range(args.positions):

            def write(
                module: object, given: tuple, named: dict, layer: int = layer, at: int = at
            ) -> tuple[tuple, dict]:
                hidden = (given[0] if given else named["hidden_states"]).clone()
                hidden[0, at] = states[layer][0, at]
                return ((hidden, *given[1:]), named) if given else (given, {**named, "hidden_states": hidden})

            handle = model.model.layers[layer].register_forward_pre_hook(write, with_kwargs=True)
            logits = model(corrupted, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            handle.remove()
            table[layer, at] = logits[pair.answer_id] - logits[pair.wrong_answer_id]
    synchronise(args)
    return time.perf_counter() - start, table


@torch.no_grad()
def theirs(model: LlamaForCausalLM, pair: EncodedPair, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """TransformerLens, which wraps the model in place; the wrapping is not counted."""
    from transformer_lens import patching

    bridge = getattr(model, "_bench_bridge", None) or bridged(model, args)
    object.__setattr__(model, "_bench_bridge", bridge)
    clean, corrupted = (torch.tensor([ids], device=args.device) for ids in (pair.clean_ids, pair.corrupted_ids))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[0, -1, pair.answer_id] - logits[0, -1, pair.wrong_answer_id]).float()

    start = time.perf_counter()
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(args.layers)]
    _, cache = bridge.run_with_cache(clean, names_filter=names, use_cache=False, output_attentions=False)
    if args.layers_timed == args.layers:
        table = patching.get_act_patch_resid_pre(bridge, corrupted, cache, metric)
    else:  # the same forwards and hooks, for some of the layers
        table = torch.zeros(args.layers_timed, args.positions)
        for layer in range(args.layers_timed):
            for at in range(args.positions):

                def write(value: torch.Tensor, hook: object, layer: int = layer, at: int = at) -> torch.Tensor:
                    value[:, at] = cache[f"blocks.{layer}.hook_resid_pre"][:, at]
                    return value

                logits = bridge.run_with_hooks(corrupted, fwd_hooks=[(names[layer], write)], use_cache=False)
                table[layer, at] = metric(logits)
    synchronise(args)
    return time.perf_counter() - start, table.double().cpu()


def bridged(model: LlamaForCausalLM, args: argparse.Namespace) -> object:
    """The model inside a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    words = Tokenizer(WordLevel({"<s>": 0}, "<s>"))
    with tempfile.TemporaryDirectory() as folder:  # it loads a tokenizer again from disk, though only ids are passed
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return TransformerBridge.boot_transformers(
            "random", hf_model=model, tokenizer=tokenizer, device=args.device, dtype=model.dtype
        )


if __name__ == "__main__":
    main()
