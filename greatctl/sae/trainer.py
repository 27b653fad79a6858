"""The training loop, for every architecture.

A step: backward, gradient projection, clip to norm 1, Adam, unit rows. Inputs (and a transcoder's targets) are
scaled to norm sqrt(d) on average; the scale is folded away when the SAE is saved.

A killed run continues to the same bytes (on a CPU): a checkpoint holds the parameters, Adam's moments, the
dead-latent counter and the log, and names the next batch by a cursor; the random numbers of a step depend on
(seed, step) alone.

Nothing in a step makes the CPU wait for a GPU: losses stay on the device until `divergence.Watch` looks at them,
and the curve is written at a few hundred points of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from ..errors import InterruptedRun, StageError
from ..events import Run
from .checkpoints import Checkpoints
from .coder import Coder
from .curve import Curve, glance
from .divergence import Trouble, Watch
from .feed import feed
from .micro import Parts, gradients, memory_errors
from .rows import Cursor, Rows, derive
from .schedule import Settings
from .setup import adam, build

__all__ = ["Checkpoints", "Settings", "Trainer", "build"]

_LOOK_EVERY = 50  # steps between two looks at the losses where looking means waiting (a GPU)


class Trainer:
    """Trains one coder on one stream of rows.

    Args:
        coder: see `build`; with `frozen_decoder` its W_dec is not touched.
        rows: the data.
        settings: see `Settings`.
        checkpoints: where to keep and find state.
        run: progress, curve and stop requests.
        device: where the coder lives.
        curve: where logged steps go.

    Attributes:
        scale, target_scale: factors on inputs and targets, sqrt(d) / mean norm (1 without targets).
        resumed_at: the step at which an earlier run was taken up (0 = none).

    Raises:
        ResourceError: the coder does not fit the device.
    """

    def __init__(
        self,
        coder: Coder,
        rows: Rows,
        settings: Settings,
        checkpoints: Checkpoints,
        run: Run,
        device: str | torch.device = "cpu",
        curve: Curve | None = None,
    ) -> None:
        self.rows, self.settings, self.checkpoints, self.run = rows, settings, checkpoints, run
        self.device, self.curve = torch.device(device), curve or Curve()
        self.scale = math.sqrt(rows.d_in) / max(rows.mean_norm, 1e-12)
        norm = rows.target_mean_norm
        self.target_scale = 1.0 if norm is None else math.sqrt(rows.d_out) / max(norm, 1e-12)
        with memory_errors():
            self.coder = coder.to(self.device).train()
            self._start()
            self.trained = {n: p for n, p in coder.named_parameters() if not (coder.frozen_decoder and n == "W_dec")}
            self.adam = adam(list(self.trained.values()), settings.lr)
        self.parts = Parts(run)
        self.watch = Watch(settings.warmup_steps, _LOOK_EVERY if self.device.type == "cuda" else 1)
        self.since_fired = torch.zeros(coder.config.d_sae, dtype=torch.int64, device=self.device)
        self.step, self.resumed_at, self.tokens = 0, 0, 0
        self.cursor = Cursor()
        self._restore()

    @property
    def dead(self) -> Tensor:
        """[d_sae] bool: latents that have not fired in the last `dead_window` tokens."""
        return self.since_fired > self.settings.dead_window

    @property
    def log(self) -> list[dict[str, float]]:
        """One row a logged step."""
        return self.curve.rows

    def fit(self) -> float:
        """Train to the last step; returns tokens per second of this call.

        Raises:
            StageError: the loss or a gradient is not finite, or has exploded; the last good checkpoint stays.
            ResourceError: memory ran out, and smaller parts of a batch did not help.
            InterruptedRun: a stop was requested; a checkpoint is written first.
        """
        began, first, last_saved = time.monotonic(), self.tokens, self.step
        stream = self.rows.stream(self.settings.seed, self.settings.batch_size, self.cursor)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), memory_errors(), feed(stream, self.device) as batches:
            while self.step < self.settings.steps:
                try:
                    cursor, rows, target = next(batches)
                except InterruptedRun:  # while rows were being harvested: this step has not begun
                    self._save()
                    raise
                x = rows.float() * self.scale
                self._one_step(x, None if target is None else target.float() * self.target_scale, cursor)
                self.cursor, self.step, self.tokens = cursor, self.step + 1, self.tokens + x.shape[0]
                self.run.progress("train", self.step, self.settings.steps, "steps", already=self.resumed_at)
                due = self.step - last_saved >= self.settings.checkpoint_every and self.checkpoints.affordable
                if due or self.run.stopping or self.step == self.settings.steps:
                    self._save()
                    last_saved = self.step
                    self.run.stop_here()
        return (self.tokens - first) / max(time.monotonic() - began, 1e-9)

    def _one_step(self, x: Tensor, target: Tensor | None, cursor: Cursor) -> None:
        step, coder = self.step, self.coder
        for group in self.adam.param_groups:
            group["lr"] = self.settings.lr_at(step)
        dead = self.dead
        terms = self.parts.attempt(lambda: self._gradients(x, target, dead), self._undo, x.shape[0])
        loss = torch.stack(tuple(terms.values())).sum()
        coder.project_gradients()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.watch.note(step, cursor, loss, norm)
        logged = step % self.settings.log_every == 0 or step == self.settings.steps - 1
        if logged or self.watch.due:
            self._look()
        if logged:
            self._note(x, target, terms, loss)
        fired = coder.take_fired(x)
        self.adam.step()
        coder.after_step()
        self.since_fired.add_(x.shape[0]).masked_fill_(fired, 0)

    def _gradients(self, x: Tensor, target: Tensor | None, dead: Tensor) -> dict[str, Tensor]:
        """One attempt at the batch's gradients; returns its loss terms, without their graphs."""
        torch.manual_seed(derive(self.settings.seed, "step", self.step))
        self.adam.zero_grad(set_to_none=True)
        return gradients(self.coder, self.parts, x, target, dead=dead, step=self.step)

    def _undo(self) -> None:
        """Forget an attempt that ran out of memory."""
        self.adam.zero_grad(set_to_none=True)
        self.coder._fired = None

    def _note(self, x: Tensor, target: Tensor | None, terms: Mapping[str, Tensor], loss: Tensor) -> None:
        """One point of the curve, on the batch and the parameters of this step."""
        row = {"step": self.step, "tokens": self.tokens, **{name: term.item() for name, term in terms.items()}}
        row |= {"loss": loss.item(), **glance(self.coder, self.parts, x, target)}
        row |= {"dead_fraction": float(self.dead.float().mean()), "lr": self.settings.lr_at(self.step)}
        self.curve.add(row)
        self.run.metric(**row)  # type: ignore[arg-type]

    def _look(self) -> None:
        """Stop the run if a step since the last look went wrong; the weights may be spoilt, the checkpoint is not."""
        if trouble := self.watch.look():
            raise self._diverged(trouble)

    def _diverged(self, trouble: Trouble) -> StageError:
        found = self.checkpoints.latest()
        back = f"the last good state is that of step {found[1]['step']}" if found else "no step was kept"
        return StageError(
            f"training diverged at step {trouble.step}",
            why=f"{trouble.words}; the batch before {asdict(trouble.cursor)}; {back}",
            fix=f"train again from the start with a lower rate, for example --force --lr {self.settings.lr / 3:.1e}",
            code="diverged",
        )

    def _save(self) -> None:
        self._look()
        tensors = {f"coder.{k}": v for k, v in self.coder.state_dict().items()}
        for name, parameter in self.trained.items():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.adam.state[parameter].items()}
        tensors["since_fired"] = self.since_fired
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "cursor": asdict(self.cursor),
            "log": self.log,
            "counts": dict(self.coder.counts),
            "watch": self.watch.state(),
            "parts": self.parts.count,
            "rows": self.rows.state(),
        }
        self.checkpoints.write(self.step, tensors, state)

    def _start(self) -> None:
        mean = (self.rows.mean * self.scale).to(self.device, torch.float32)
        of = self.rows.target_mean if self.coder.reads_target else None
        self.coder.start(mean, None if of is None else (of * self.target_scale).to(self.device, torch.float32))

    def _restore(self) -> None:
        found = self.checkpoints.latest()
        self.curve.restore(found[1]["log"] if found else [])
        if found is None:
            return
        tensors, state = found
        prefix = "coder."
        self.coder.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, parameter in self.trained.items():
            for key, value in self.adam.state[parameter].items():
                value.copy_(tensors[f"adam.{name}.{key}"])
        self.since_fired = tensors["since_fired"].to(self.device)
        self.step = self.resumed_at = int(state["step"])
        self.tokens = int(state["tokens"])
        self.cursor = Cursor(**state["cursor"])
        self.parts.count = int(state["parts"])
        self.coder.counts.update(state["counts"])
        self.watch.restore(state["watch"])
        self.rows.restore(state["rows"])
