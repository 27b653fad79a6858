"""Eight SAEs over one stream of rows against eight single runs: total times, their ratio, how long rows were waited for.

    python tests/benchmarks/sae_sweep.py                      # CPU: d_model 64, d_sae 256 and 512, k 8 and 16
    python tests/benchmarks/sae_sweep.py --shape llama3-8b    # CUDA: d_model 4096, d_sae 16,384 and 32,768, k 32 and 64

Synthetic rows (sparse mixtures of planted directions, bfloat16 on CUDA) are written as shards, and read back by the
very classes that `greatctl train` uses, with a memory budget below the data's size, so that every epoch reads every
shard again. A run counts from opening its shards (the two passes over them for norms and means) to its last step;
both parts are printed. The arms are topk and batchtopk x two k x two d_sae. Single runs come first, one after the
other; then the sweep. No checkpoint is written. The last column is the largest difference between the weights of an
SAE trained in the sweep and alone: 0 on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from greatctl.events import Run
from greatctl.sae.batchtopk import BatchTopK
from greatctl.sae.checkpoints import Checkpoints
from greatctl.sae.data import ActivationRows
from greatctl.sae.schedule import Settings, default_lr
from greatctl.sae.setup import build
from greatctl.sae.topk import TopK
from greatctl.sae.trainer import Trainer
from greatctl.sae.walk import walk
from greatctl.store.shards import ShardReader, ShardWriter

SHAPES = {
    "cpu": {"d_model": 64, "d_sae": (256, 512), "k": (8, 16), "rows": 40_000, "steps": 150, "batch": 1024},
    "llama3-8b": {
        "d_model": 4096,
        "d_sae": (16_384, 32_768),
        "k": (32, 64),
        "rows": 131_072,
        "steps": 150,
        "batch": 4096,
    },
}
Arm = tuple[type[TopK], int, int]  # architecture, d_sae, k
_CHUNK, _FEATURES, _ACTIVE, _SHARDS = 8192, 1024, 0.02, 8


class Unwritten(Checkpoints):
    """Checkpoints that cost nothing: the benchmark is about training."""

    def write(self, step: int, tensors: object, state: object) -> None:
        """Write nothing."""


@dataclass
class Timed:
    """Seconds of a run, the share of its training in which rows were waited for, and what it learnt."""

    opening: float
    training: float
    waited: float
    steps: list[float]
    weights: list[Tensor] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Opening and training."""
        return self.opening + self.training


def main() -> None:
    """Print the table."""
    a = arguments()
    arms: list[Arm] = [(cls, d_sae, k) for cls in (TopK, BatchTopK) for d_sae in a.d_sae for k in a.k]
    print(
        f"{len(arms)} SAEs, d_model {a.d_model}, {a.rows:,} rows, {a.steps} steps of {a.batch}, {name_of(a.device)}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        write_rows(Path(folder), a)
        for cls in (TopK, BatchTopK):  # compiling and the first use of the device count for nobody
            timed(Path(folder), [(cls, a.d_sae[0], a.k[0])], a, steps=3)
        peaks = {}
        start_peak(a.device)
        alone = [timed(Path(folder), [arm], a, steps=a.steps) for arm in arms]
        peaks["eight single runs"] = peak(a.device)
        start_peak(a.device)
        together = timed(Path(folder), arms, a, steps=a.steps)
        peaks["one sweep of eight"] = peak(a.device)
    show(arms, alone, together, peaks)


def timed(folder: Path, arms: list[Arm], a: argparse.Namespace, *, steps: int) -> Timed:
    """Open the shards, train the arms in one walk."""
    gc.collect()
    if a.device.type == "cuda":
        torch.cuda.empty_cache()
    began = clock(a.device)
    reader = ShardReader(folder)
    held_out = torch.zeros(a.rows // 256 + 1, dtype=torch.bool)
    rows = ActivationRows(reader, [0], held_out, budget=a.budget, ahead=a.device.type == "cuda")
    trainers = []
    for cls, d_sae, k in arms:
        rules = Settings(steps, a.batch, default_lr(d_sae, 10_000), steps // 20, 10**7, 10**9, max(1, steps // 50), 0)
        coder = build(cls, cls.Config(**{"d_in": a.d_model, "d_sae": d_sae, "k": k}), 0)
        trainers.append(Trainer(coder, rows, rules, Unwritten(folder / "none"), Run("train"), a.device))
    opened = clock(a.device)
    walked = walk(trainers)
    ended = clock(a.device)
    weights = [trainer.coder.W_dec.detach()[: 1 << 10].cpu().clone() for trainer in trainers]
    if steps > 3:
        print(f"  {len(arms)} at once ({trainers[0].stepping.name} step): {ended - began:.1f} s", flush=True)
    return Timed(opened - began, ended - opened, walked.waited / walked.seconds, walked.steps, weights)


def show(arms: list[Arm], alone: list[Timed], together: Timed, peaks: dict[str, float]) -> None:
    """The arms, then the sums."""
    print(f"\n{'arm':28}{'alone, s':>10}{'waited':>9}{'own steps in the sweep, s':>28}{'max difference':>17}")
    for (cls, d_sae, k), one, steps, weights in zip(arms, alone, together.steps, together.weights, strict=True):
        apart = float((one.weights[0] - weights).abs().max())
        arm = f"{cls.name} d_sae {d_sae} k {k}"
        print(f"{arm:28}{one.training:10.2f}{one.waited:9.1%}{steps:28.2f}{apart:17.1e}")
    single = Timed(sum(t.opening for t in alone), sum(t.training for t in alone), 0, [])
    waited = sum(t.waited * t.training for t in alone) / single.training
    print(f"\n{'':28}{'opening, s':>12}{'training, s':>13}{'total, s':>10}{'waited':>9}{'peak GiB':>10}")
    for (label, gib), row, share in zip(peaks.items(), (single, together), (waited, together.waited), strict=True):
        print(f"{label:28}{row.opening:12.1f}{row.training:13.1f}{row.total:10.1f}{share:9.1%}{gib:10.2f}")
    ratio, training = single.total / together.total, single.training / together.training
    print(f"\nthe sweep is {ratio:.2f} times as fast as the single runs ({training:.2f} in training alone)")


def write_rows(folder: Path, a: argparse.Namespace) -> None:
    """Shards of sparse mixtures of planted unit directions, made on the device."""
    g = torch.Generator(a.device).manual_seed(7)
    truth = torch.nn.functional.normalize(torch.randn(_FEATURES, a.d_model, generator=g, device=a.device), dim=1)
    kind = torch.bfloat16 if a.device.type == "cuda" else torch.float32
    writer = ShardWriter(folder)
    for number, span in enumerate(torch.arange(a.rows).tensor_split(_SHARDS)):
        parts = []
        for part in span.split(_CHUNK):
            shape = (part.numel(), _FEATURES)
            size = 1 + torch.rand(shape, generator=g, device=a.device)
            active = torch.rand(shape, generator=g, device=a.device) < _ACTIVE
            parts.append(((size * active) @ truth).to(kind).cpu())
        n = span.numel()
        tensors = {
            "acts": torch.cat(parts),
            "window": (span // 256).int(),
            "position": (span % 256).int(),
            "token": torch.ones(n, dtype=torch.int32),
        }
        writer.write(number, tensors, n)
    writer.finish()


def clock(device: torch.device) -> float:
    """Seconds, with nothing left to do on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start_peak(device: torch.device) -> None:
    """Count the peak anew (a process cannot, on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float:
    """GiB: of the device, or of the process until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def name_of(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def arguments() -> argparse.Namespace:
    """The command line; a shape gives what is not named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--device", help="cpu, cuda (default: as the shape asks)")
    for key in ("d-model", "rows", "steps", "batch"):
        parser.add_argument(f"--{key}", type=int)
    parser.add_argument("--d-sae", type=int, nargs=2)
    parser.add_argument("--k", type=int, nargs=2)
    parser.add_argument("--budget", type=int, help="bytes of rows in memory at once (default: a quarter of all)")
    parser.add_argument("--folder", type=Path, help="where the shards are written for the time being")
    a = parser.parse_args()
    for key, value in SHAPES[a.shape].items():
        if getattr(a, key) is None:
            setattr(a, key, value)
    a.device = torch.device(a.device or ("cpu" if a.shape == "cpu" else "cuda"))
    a.budget = a.budget or a.rows * a.d_model * (2 if a.device.type == "cuda" else 4) // 4 + 1
    return a


if __name__ == "__main__":
    main()
