"""One training step of a TopK or BatchTopK autoencoder: the floor, the peers, and greatctl's plain and fast steps.

    python tests/benchmarks/sae_step.py                                       # CPU: 256 -> 2048, k 32, batch 4096
    python tests/benchmarks/sae_step.py --device cuda --d-model 4096 --d-sae 65536 --k 64 --batch-size 8192

Floor: the encoder's product, one pass of weights and Adam's moments through memory (written once, read once), the
gathers of the active rows (decoder, residuals, inputs), and one reading of the pre-activations, each at the rate that is
measured here. Peers run under their own trainers in environments of their own (`--peer-path NAME=FOLDER` puts a folder
of packages first, otherwise .bench/NAME/bin/python is used). Errors are relative distances to the plain formula in
float64, on fresh inputs: the loss, the gradients, and what two steps change in the weights. Products in bf16 change which
of nearly equal latents are chosen, and so gradients, whatever computes them: compare with the plain formula under bf16
autocast. `--curve N` also trains the
plain and the fast step on the same batches for N steps, and the plain one with two seeds. No test asserts a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from greatctl.events import Run
from greatctl.sae.batchtopk import BatchTopK
from greatctl.sae.fast import choose
from greatctl.sae.matryoshka import Matryoshka
from greatctl.sae.setup import build
from greatctl.sae.step import PlainStep
from greatctl.sae.topk import TopK

HERE = Path(__file__).resolve()
ARCHITECTURES = {"topk": TopK, "batchtopk": BatchTopK, "matryoshka": Matryoshka}
KINDS = ("plain", "fast, float32", "plain, bf16 autocast", "fast")
PEERS = {"sparsify": ("topk",), "dictionary_learning": ("topk", "batchtopk"), "saelens": ("topk", "batchtopk")}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def rows(a: argparse.Namespace, seed: int, n: int | None = None) -> Tensor:
    """Rows with some structure, of mean norm sqrt(d)."""
    generator = torch.Generator(a.device).manual_seed(seed)
    fixed = torch.Generator(a.device).manual_seed(99)
    n = n or a.batch_size
    mix = torch.randn(64, a.d_model, generator=fixed, device=a.device)
    x = torch.randn(n, 64, generator=generator, device=a.device) @ mix / 8
    x += torch.randn(n, a.d_model, generator=generator, device=a.device)
    return x * (a.d_model**0.5 / x.norm(dim=1).mean())


def coder(a: argparse.Namespace, name: str, seed: int = 0, device: str | None = None):
    cls = ARCHITECTURES[name]
    return build(cls, cls.Config(d_in=a.d_model, d_sae=a.d_sae, k=a.k), seed).to(device or a.device).train()


def floor(a: argparse.Namespace) -> dict[str, float]:
    """Seconds of what no step can do without."""
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    x = torch.randn(a.batch_size, a.d_model, device=a.device, dtype=dtype)
    w = torch.randn(a.d_sae, a.d_model, device=a.device, dtype=dtype)
    product = timed(lambda: x @ w.T, a.device, 7)
    big = torch.empty(1 << (28 if a.device == "cuda" else 23), device=a.device).normal_()
    other = torch.empty_like(big)
    rate = 2 * big.numel() * 4 / timed(lambda: other.copy_(big), a.device, 7)
    size = x.element_size()
    state = 2 * a.d_sae * a.d_model * 3 * 4 * 2  # two matrices, weights and two moments, read and written
    gathers = 3 * a.batch_size * a.k * a.d_model * size
    reading = a.batch_size * a.d_sae * size
    found = {"encoder product": product, "weights and moments": state / rate, "gathers": gathers / rate}
    return found | {"pre-activations": reading / rate}


def ours(a: argparse.Namespace, name: str, kind: str) -> tuple[float, int]:
    """Seconds a step and peak memory in bytes (GPU)."""
    if a.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    made = coder(a, name)
    step = stepping(made, kind, a.device)
    batches, dead = [rows(a, seed) for seed in range(3)], torch.zeros(a.d_sae, dtype=torch.bool, device=a.device)
    at = 0

    def one() -> None:
        nonlocal at
        step.gradients(batches[at % 3], None, dead=dead, step=at, seed=at)
        step.update(1e-4)
        at += 1

    seconds = timed(one, a.device, a.repeats)
    peak = torch.cuda.max_memory_allocated() if a.device == "cuda" else 0
    return seconds, peak


def stepping(made, kind: str, device: str) -> PlainStep:
    if kind.startswith("plain"):
        return PlainStep(made, 1e-4, Run("train"))
    if kind == "fast, float32":
        from greatctl.sae.fused import FusedStep

        return FusedStep(made, 1e-4, Run("train"), dtype=torch.float32)
    return choose(made, 1e-4, Run("train"), torch.device(device))


def errors(a: argparse.Namespace, name: str, kind: str) -> dict[str, float]:
    """Relative distances to the plain step in float64 after two steps, on a smaller coder where it is a GPU's."""
    small = argparse.Namespace(**vars(a))
    if a.device == "cuda":
        small.d_sae, small.batch_size = min(a.d_sae, 16_384), min(a.batch_size, 2048)
    truth, mine = coder(small, name), coder(small, name)
    start = {key: value.clone().double() for key, value in truth.state_dict().items()}
    plain, step = PlainStep(truth.double(), 1e-3, Run("train")), stepping(mine, kind, a.device)
    dead = torch.zeros(small.d_sae, dtype=torch.bool, device=a.device)
    dead[:: small.d_sae // 50] = True
    apart = {}
    for at in range(2):
        x = rows(small, 50 + at)
        with torch.autocast(a.device, torch.bfloat16, enabled=kind == "plain, bf16 autocast"):
            got = step.gradients(x, None, dead=dead, step=at, seed=at)
        true = plain.gradients(x.double(), None, dead=dead, step=at, seed=at)
        loss = [float(sum(t.terms.values())) for t in (got, true)]
        apart["loss"] = abs(loss[0] / loss[1] - 1)
        step.update(1e-3)
        plain.update(1e-3)
        if at == 0:  # Adam's first moment after one step is the gradient
            for key in ("W_enc", "W_dec"):
                moments = [s.state()[f"adam.{key}.exp_avg"].double() for s in (step, plain)]
                apart[f"gradient {key}"] = float((moments[0] - moments[1]).norm() / moments[1].norm())
    for key in ("W_enc", "W_dec"):
        new, old = truth.state_dict()[key], start[key]
        apart[f"step {key}"] = float((mine.state_dict()[key].double() - new).norm() / (new - old).norm())
    return apart


def peers(a: argparse.Namespace, name: str) -> dict[str, tuple[float, int] | str]:
    """Seconds and bytes of each peer, or why there are none."""
    found: dict[str, tuple[float, int] | str] = {}
    given = dict(pair.split("=", 1) for pair in a.peer_path)
    for peer, architectures in PEERS.items():
        if name not in architectures:
            continue
        python, env = HERE.parents[2] / ".bench" / peer / "bin" / "python", dict(os.environ)
        if peer in given:
            python, env["PYTHONPATH"] = Path(sys.executable), given[peer]
        elif not python.exists():
            found[peer] = "not installed"
            continue
        words = [
            str(python),
            str(HERE.parent / "peers" / "step.py"),
            "--peer",
            peer,
            "--arch",
            name,
            "--device",
            a.device,
        ]
        for key in ("d_model", "d_sae", "k", "batch_size"):
            words += [f"--{key.replace('_', '-')}", str(getattr(a, key))]
        words += ["--steps", str(a.peer_steps)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=a.peer_seconds)
        except subprocess.TimeoutExpired:
            found[peer] = f"not done within {a.peer_seconds} s"
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("STEP ")]
        if lines:
            read = json.loads(lines[-1][5:])
            found[peer] = (read["seconds"], read["peak"])
        else:
            found[peer] = (done.stderr.strip().splitlines() or ["no output"])[-1][:100]
    return found


def curve(a: argparse.Namespace, name: str, kind: str, seed: int, steps: int) -> list[float]:
    """Losses over a training, averaged over twentieths of it."""
    made = coder(a, name, seed)
    step, losses = stepping(made, kind, a.device), []
    since = torch.zeros(a.d_sae, dtype=torch.int64, device=a.device)
    for at in range(steps):
        x = rows(a, 1000 + at)
        lr = a.curve_lr * min(1.0, (at + 1) / 100, (steps - at) / (steps / 5))
        taken = step.gradients(x, None, dead=since > 50 * a.batch_size, step=at, seed=at)
        step.update(lr)
        since = (since + a.batch_size).masked_fill(taken.fired, 0)
        losses.append(taken.terms["mse"])
    values = torch.stack(losses).float()
    return [float(part.mean()) for part in values.chunk(20)]


def print_curves(a: argparse.Namespace, name: str) -> None:
    """The fast curve beside two seeds of the plain one."""
    lines = {"fast, seed 0": curve(a, name, "fast", 0, a.curve)}
    lines |= {f"plain, seed {seed}": curve(a, name, "plain", seed, a.curve) for seed in (0, 1)}
    print(
        f"\n{name}: reconstruction loss over {a.curve:,} steps, means of twentieths (1st, 2nd, 5th, 10th, 15th, 20th)"
    )
    for label, values in lines.items():
        print(f"  {label:14}" + " ".join(f"{values[i]:9.5f}" for i in (0, 1, 4, 9, 14, 19)))
    first, plain, other = lines.values()
    apart = max(abs(x / y - 1) for x, y in zip(first, plain, strict=True))
    noise = max(abs(x / y - 1) for x, y in zip(other, plain, strict=True))
    print(
        f"  largest difference fast to plain {100 * apart:.3f} %, between two seeds of plain {100 * noise:.3f} %",
        flush=True,
    )


def main() -> None:
    """Print the tables."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    ask.add_argument("--arch", nargs="+", default=["topk", "batchtopk"], choices=list(ARCHITECTURES))
    for name, value in (("d-model", 256), ("d-sae", 2048), ("k", 32), ("batch-size", 4096)):
        ask.add_argument(f"--{name}", type=int, default=value)
    ask.add_argument("--repeats", type=int, default=9)
    ask.add_argument("--peer-path", action="append", default=[], metavar="NAME=FOLDER")
    ask.add_argument("--peer-steps", type=int, default=12)
    ask.add_argument("--peer-seconds", type=int, default=120, help="a peer is given up after so long")
    ask.add_argument("--skip", nargs="+", default=[], choices=("peers", "plain", "errors", "times"))
    ask.add_argument("--curve", type=int, default=0, metavar="STEPS")
    ask.add_argument("--curve-lr", type=float, default=1e-3)
    a = ask.parse_args()
    what = torch.cuda.get_device_name() if a.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{a.device} ({what}), torch {torch.__version__}: {a.d_model} -> {a.d_sae}, k {a.k}, batch {a.batch_size}")
    if "times" not in a.skip:
        parts = floor(a)
        least = sum(parts.values())
        print("floor: " + ", ".join(f"{k} {1e3 * v:.2f}" for k, v in parts.items()) + f" = {1e3 * least:.2f} ms")
        for name in a.arch:
            print(f"\n{name:28}{'ms a step':>11}{'tokens/s':>12}{'of best peer':>14}{'of floor':>10}{'GiB':>7}")
            lines: dict[str, tuple[float, int] | str] = {} if "peers" in a.skip else dict(peers(a, name))
            best = min((v[0] for v in lines.values() if not isinstance(v, str)), default=float("nan"))
            if "plain" not in a.skip:
                lines["greatctl, plain formula"] = ours(a, name, "plain")
            lines["greatctl, fast"] = ours(a, name, "fast")
            for label, value in lines.items():
                if isinstance(value, str):
                    print(f"{label:28}{value}")
                    continue
                seconds, peak = value
                memory = f"{peak / 2**30:7.2f}" if peak else f"{'':7}"
                print(
                    f"{label:28}{1e3 * seconds:11.2f}{a.batch_size / seconds:12,.0f}{seconds / best:14.2f}"
                    f"{seconds / least:10.2f}{memory}",
                    flush=True,
                )
    if "errors" not in a.skip:
        print("\nrelative distance to the plain formula in float64")
        for name in a.arch:
            for kind in KINDS if a.device == "cuda" else ("plain", "fast"):
                apart = errors(a, name, kind)
                print(
                    f"  {name:10} {kind:21}" + ", ".join(f"{key} {value:.1e}" for key, value in apart.items()),
                    flush=True,
                )
    if a.curve:
        for name in a.arch:
            print_curves(a, name)


if __name__ == "__main__":
    main()
