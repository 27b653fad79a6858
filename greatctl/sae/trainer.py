"""The training loop, for every architecture.

A step: backward, gradient projection, clip to norm 1, Adam, unit rows. The learning rate warms up, stays, and
falls to 0 over the last fifth. Inputs are scaled to norm sqrt(d_in) on average; the scale is folded away when
the SAE is saved.

A killed run continues to the same bytes (on a CPU): a checkpoint holds the parameters, Adam's moments, the
dead-latent counter and the log, and names the next batch by a cursor; the random numbers of a step depend on
(seed, step) alone. Checkpoints are single safetensors files, so that one rename makes them whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import PluginError, StageError
from ..events import Run
from ..store.files import canonical_json, write_bytes
from .coder import Coder, CoderConfig
from .data import ActivationRows, Cursor, derive

__all__ = ["Checkpoints", "Settings", "Trainer", "build", "default_dead_window", "default_lr"]

_KEPT = 2
_LONG_RUN = 10_000


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Attributes:
        steps: optimiser steps.
        batch_size: rows a step (to one row; see `ActivationRows.stream`).
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        dead_window: tokens without firing after which a latent counts as dead.
        checkpoint_every, log_every: steps.
        seed: of the initialisation, the shuffle and whatever an architecture draws.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    dead_window: int
    checkpoint_every: int
    log_every: int
    seed: int

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        decay = max(1, self.steps // 5)
        up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        down = min(1.0, (self.steps - step) / decay)
        return self.lr * up * down


def default_lr(d_sae: int, steps: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14), the published rule for long runs; raised by sqrt(10,000 / steps) for shorter
    ones, which otherwise end before they have learnt (at 150 steps: 0.56 of the variance instead of 0.69).
    At most 3e-3.
    """
    return min(3e-3, 2e-4 * math.sqrt(2**14 / d_sae * max(1.0, _LONG_RUN / steps)))


def default_dead_window(run_tokens: int, batch_size: int) -> int:
    """Ten million tokens, or 5 % of a shorter run; at least eight batches."""
    return max(min(10_000_000, run_tokens // 20), 8 * batch_size)


def build(cls: type[Coder], config: CoderConfig, seed: int) -> Coder:
    """A freshly initialised coder; torch's global generator is left as it was.

    Raises:
        PluginError: the class does not make a `Coder`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        coder = cls(config)
    if not isinstance(coder, Coder):
        raise PluginError(
            f"architecture {getattr(cls, 'name', cls.__name__)!r} is not a Coder",
            why="training needs the parameters and hooks of greatctl.sae.coder.Coder",
            fix="derive the class from greatctl.sae.coder.Coder",
        )
    return coder


class Checkpoints:
    """Numbered checkpoint files of a run; the last two are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        """Write the checkpoint of `step` whole and durably, then remove all but the last two."""
        data = save_tensors(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"state": canonical_json(state)}
        )
        write_bytes(self.folder / f"step-{step:09d}.safetensors", data)
        for old in self._files()[:-_KEPT]:
            old.unlink()

    def latest(self) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and state of the newest readable checkpoint."""
        for path in reversed(self._files()):
            try:
                with safe_open(path, framework="pt") as stream:
                    state = json.loads(stream.metadata()["state"])
                    return {name: stream.get_tensor(name) for name in stream.keys()}, state  # noqa: SIM118
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


class Trainer:
    """Trains one coder on one stream of rows.

    Args:
        coder: see `build`.
        rows: the data.
        settings: see `Settings`.
        checkpoints: where to keep and find state.
        run: progress, curve and stop requests.
        device: where the coder lives.

    Attributes:
        scale: factor on the inputs, sqrt(d_in) / mean norm.
        log: one row a logged step.
        resumed_at: the step at which an earlier run was taken up (0 = none).
    """

    def __init__(
        self,
        coder: Coder,
        rows: ActivationRows,
        settings: Settings,
        checkpoints: Checkpoints,
        run: Run,
        device: str | torch.device = "cpu",
    ) -> None:
        self.rows, self.settings, self.checkpoints, self.run = rows, settings, checkpoints, run
        self.device = torch.device(device)
        self.scale = math.sqrt(rows.d_in) / max(rows.mean_norm, 1e-12)
        self.coder = coder.to(self.device).train()
        with torch.no_grad():
            coder.b_dec.copy_(rows.mean * self.scale)
        self.adam = torch.optim.Adam(coder.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.since_fired = torch.zeros(coder.config.d_sae, dtype=torch.int64, device=self.device)
        self.step, self.resumed_at, self.tokens = 0, 0, 0
        self.cursor = Cursor()
        self.log: list[dict[str, float]] = []
        self._restore()

    @property
    def dead(self) -> Tensor:
        """[d_sae] bool: latents that have not fired in the last `dead_window` tokens."""
        return self.since_fired > self.settings.dead_window

    def fit(self) -> float:
        """Train to the last step; returns tokens per second of this call.

        Raises:
            StageError: the loss or a gradient is not finite; the last good checkpoint stays.
            InterruptedRun: a stop was requested; a checkpoint is written first.
        """
        began, first, last_saved = time.monotonic(), self.tokens, self.step
        stream = self.rows.stream(self.settings.seed, self.settings.batch_size, self.cursor)
        with torch.random.fork_rng(devices=[]):
            while self.step < self.settings.steps:
                cursor, batch = next(stream)
                self._one_step(batch.to(self.device, torch.float32) * self.scale)
                self.cursor, self.step, self.tokens = cursor, self.step + 1, self.tokens + batch.shape[0]
                self.run.progress("train", self.step, self.settings.steps, "steps", already=self.resumed_at)
                due = self.step - last_saved >= self.settings.checkpoint_every
                if due or self.run.stopping or self.step == self.settings.steps:
                    self._save()
                    last_saved = self.step
                    self.run.stop_here()
        return (self.tokens - first) / max(time.monotonic() - began, 1e-9)

    def _one_step(self, x: Tensor) -> None:
        step, coder = self.step, self.coder
        torch.manual_seed(derive(self.settings.seed, "step", step))
        for group in self.adam.param_groups:
            group["lr"] = self.settings.lr_at(step)
        dead = self.dead
        terms = coder.losses(x, dead=dead, step=step)
        loss = torch.stack(tuple(terms.values())).sum()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        coder.project_gradients()
        norm = torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        if not math.isfinite(loss.item() + norm.item()):
            raise self._diverged(terms)
        if step % self.settings.log_every == 0 or step == self.settings.steps - 1:
            self._note(x, terms, loss.item())
        fired = coder.take_fired(x)
        self.adam.step()
        coder.after_step()
        self.since_fired += x.shape[0]
        self.since_fired[fired] = 0

    @torch.no_grad()
    def _note(self, x: Tensor, terms: Mapping[str, Tensor], loss: float) -> None:
        """One point of the curve, on the batch and the parameters of this step."""
        fired, counts = self.coder._fired, self.coder.counts.copy()
        buffers = [b.clone() for b in self.coder.buffers()]
        latents = self.coder.encode(x)
        residual = (x - self.coder.decode(latents)).double().square().sum()
        around = (x - x.mean(dim=0)).double().square().sum()
        for buffer, before in zip(self.coder.buffers(), buffers, strict=True):
            buffer.copy_(before)  # looking must not change what is looked at
        self.coder._fired, self.coder.counts = fired, counts
        row = {name: term.item() for name, term in terms.items()}
        row |= {
            "loss": loss,
            "explained_variance": 1 - float(residual) / max(float(around), 1e-30),
            "l0": float((latents > 0).sum()) / x.shape[0],
            "dead_fraction": float(self.dead.float().mean()),
            "lr": self.settings.lr_at(self.step),
        }
        self.log.append({"step": self.step, "tokens": self.tokens, **row})
        self.run.metric(self.step, **row)

    def _diverged(self, terms: Mapping[str, Tensor]) -> StageError:
        values = ", ".join(f"{k} = {v.item():g}" for k, v in terms.items())
        return StageError(
            f"training diverged at step {self.step}",
            why=f"the loss or its gradient is not finite ({values}; next batch {asdict(self.cursor)})",
            fix=f"train again with a lower rate, for example --lr {self.settings.lr / 3:.1e}",
            code="diverged",
        )

    def _save(self) -> None:
        tensors = {f"coder.{k}": v for k, v in self.coder.state_dict().items()}
        for name, parameter in self.coder.named_parameters():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.adam.state[parameter].items()}
        tensors["since_fired"] = self.since_fired
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "cursor": asdict(self.cursor),
            "log": self.log,
            "counts": dict(self.coder.counts),
        }
        self.checkpoints.write(self.step, tensors, state)

    def _restore(self) -> None:
        found = self.checkpoints.latest()
        if found is None:
            return
        tensors, state = found
        prefix = "coder."
        self.coder.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, parameter in self.coder.named_parameters():
            start = f"adam.{name}."
            moments = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            self.adam.state[parameter] = {k: v.to(self.device) for k, v in moments.items()}
        self.since_fired = tensors["since_fired"].to(self.device)
        self.step = self.resumed_at = int(state["step"])
        self.tokens = int(state["tokens"])
        self.cursor = Cursor(**state["cursor"])
        self.log = list(state["log"])
        self.coder.counts.update(state["counts"])
