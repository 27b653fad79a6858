"""What every trainer of `sae_quality.py` shares: arguments, the same rows in the same order, and how weights are handed back.

A trainer is a script that runs in an environment of its own; it needs torch and safetensors and whatever it compares.
It writes one folder a run in SAELens layout (cfg.json, sae_weights.safetensors), which one program then measures.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

OUTLIER = 10.0  # rows above so many times the median norm are left out, as greatctl leaves them out
CALIBRATION = 8192


def arguments() -> argparse.Namespace:
    """The arguments of a trainer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=None, help="a rate to try besides the trainer's own")
    parser.add_argument("--rates", default="", help="further rates to try, a,b,c (ours alone)")
    parser.add_argument("--searches", type=int, default=5, help="trainings to find a coefficient that gives L0 = k")
    a = parser.parse_args()
    a.steps = a.tokens // a.batch_size
    return a


class _Stub(types.ModuleType):
    """An empty module: its classes are empty classes, everything else does nothing."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Exception,), {}) if name[0].isupper() else MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stubbed packages and whatever is below them."""

    def __init__(self, roots: set[str]) -> None:
        self.roots = roots

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in self.roots:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module) -> None:
        return None


def stub(*names: str) -> None:
    """Put an empty package in the place of each that is not installed; for loggers, loaders and tables that a training
    never needs."""
    absent = {name for name in names if importlib.util.find_spec(name) is None}
    if absent:
        sys.meta_path.append(_Stubs(absent))
        print(f"not installed, empty packages stand in: {', '.join(sorted(absent))}", file=sys.stderr)


class Rows:
    """Ordinary rows of the stored activations: `train` [n, d] on the device, `held` [m, d] on the CPU."""

    def __init__(self, folder: Path, device: str) -> None:
        facts = json.loads((folder / "rows.json").read_text())
        special = torch.tensor(facts["special_ids"])
        shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        acts = torch.cat([shard["acts"] for shard in shards])
        ordinary = ~torch.isin(torch.cat([shard["token"] for shard in shards]).long(), special)
        held = torch.cat([shard["window"] for shard in shards]) >= facts["held_out_from"]
        norm = acts.norm(dim=1)
        ordinary &= norm <= OUTLIER * norm[ordinary].median()
        self.train = acts[ordinary & ~held].to(device)
        self.held = acts[ordinary & held]
        self.d_in = acts.shape[1]

    def calibration(self) -> Tensor:
        """Held-out rows [8192, d] on which L0 is set; the measurement uses others."""
        return self.held[::2][:CALIBRATION].to(self.train.device)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Endless batches [size, d]; every trainer gets the same ones."""
        epoch = 0
        while True:
            order = torch.randperm(self.train.shape[0], generator=torch.Generator().manual_seed(1000 * seed + epoch))
            for part in order.to(self.train.device).split(size):
                if part.numel() == size:
                    yield self.train[part]
            epoch += 1


def hand_back(
    a: argparse.Namespace,
    peer: str,
    variant: str,
    architecture: str,
    tensors: Mapping[str, Tensor],
    *,
    seconds: float,
    **cfg: object,
) -> None:
    """Write one run's folder; `tensors` and `cfg` as the SAELens layout names them."""
    folder = a.out / f"{peer}--{a.arch}--{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.detach().float().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(kept, folder / "sae_weights.safetensors")
    d_sae, d_in = kept["W_dec"].shape
    described = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
        **cfg,
    }
    (folder / "cfg.json").write_text(json.dumps(described))
    run = {"peer": peer, "arch": a.arch, "variant": variant, "seconds": round(seconds, 1)}
    (folder / "peer.json").write_text(json.dumps(run))
    print(f"{folder.name}: {seconds:.1f} s", flush=True)


def clock(device: str) -> float:
    """Seconds now, with the device's work done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def coefficient_for(k: int, train: Callable[[float], float], first: float, most: int) -> None:
    """Train with one coefficient after the other until L0 is within 2 % of k.

    Args:
        train: coefficient -> L0 on the calibration rows; writes its own folder. L0 falls as the coefficient grows.
        most: trainings at most.
    """
    tried: list[tuple[float, float]] = []
    at = math.log(first)
    for _ in range(most):
        l0 = max(train(math.exp(at)), 1e-2)
        tried.append((at, math.log(l0 / k)))
        if abs(l0 / k - 1) < 0.02:
            return
        above = [t for t in tried if t[1] > 0]
        below = [t for t in tried if t[1] <= 0]
        if above and below:  # between the nearest on either side
            (x0, y0), (x1, y1) = max(above), min(below)
            at = x0 + (x1 - x0) * y0 / (y0 - y1)
        else:
            at += 0.8 * tried[-1][1] if abs(tried[-1][1]) < 3 else math.copysign(2.5, tried[-1][1])
