"""What one coder learns from a stream of batches, for every architecture; `walk` brings the batches.

A step: backward, gradient projection, clip to norm 1, Adam, unit rows (see `step`). Inputs (and a transcoder's
targets) are scaled to norm sqrt(d) on average; the scale is folded away when the SAE is saved.

A killed run continues to the same bytes (on a CPU): a checkpoint holds the parameters, Adam's moments, the
dead-latent counter and the log, and names the next batch by a cursor; the random numbers of a step depend on
(seed, step) alone.

Nothing in a step makes the CPU wait for a GPU: losses and the curve's points stay on the device until
`divergence.Watch` looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from ..errors import StageError
from ..events import Run
from .checkpoints import Checkpoints
from .coder import Coder
from .curve import Curve, Point, fetched, glance
from .divergence import Trouble, Watch
from .fast import choose
from .micro import Parts, memory_errors
from .rows import Cursor, Rows, derive
from .schedule import Settings
from .setup import build
from .walk import walk

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
        resumed_at, resumed_tokens: the step at which an earlier run was taken up (0 = none), and its tokens.
        cursor: the next batch.

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
            self.stepping = choose(self.coder, settings.lr, run, self.device)
        self.watch = Watch(settings.warmup_steps, _LOOK_EVERY if self.device.type == "cuda" else 1)
        self.since_fired = torch.zeros(coder.config.d_sae, dtype=torch.int64, device=self.device)
        self.step, self.resumed_at, self.tokens, self.resumed_tokens = 0, 0, 0, 0
        self.cursor = Cursor()
        self._points: list[Point] = []
        self._restore()

    @property
    def dead(self) -> Tensor:
        """[d_sae] bool: latents that have not fired in the last `dead_window` tokens."""
        return self.since_fired > self.settings.dead_window

    @property
    def parts(self) -> Parts:
        """Into how many parts a batch is cut."""
        return self.stepping.parts

    @property
    def log(self) -> list[dict[str, float]]:
        """One row a logged step."""
        return self.curve.rows

    @property
    def finished(self) -> bool:
        """Whether the last step is taken."""
        return self.step >= self.settings.steps

    def fit(self) -> float:
        """Train to the last step; returns tokens per second of this call. Raises: as `walk`."""
        first, walked = self.tokens, walk([self])
        return (self.tokens - first) / walked.seconds

    def take(self, x: Tensor, target: Tensor | None, cursor: Cursor) -> None:
        """One step on a scaled batch.

        Args:
            x: [n, d_in] float32; target: [n, d_out], where there is one.
            cursor: the batch after this one.

        Raises:
            StageError: a step since the last look went wrong (`diverged`); the weights may be spoilt, the checkpoint
                is not.
            ResourceError: memory ran out, and smaller parts of a batch did not help.
        """
        step = self.step
        seed = derive(self.settings.seed, "step", step)
        taken = self.stepping.gradients(x, target, dead=self.dead, step=step, seed=seed)
        loss = torch.stack(tuple(taken.terms.values())).sum()
        self.watch.note(step, cursor, loss, taken.norm)
        if step % self.settings.log_every == 0 or step == self.settings.steps - 1:
            self._points.append(self._point(x, target, taken.terms, loss))
        if self.watch.due:
            self._look()
        self.stepping.update(self.settings.lr_at(step))
        self.since_fired.add_(x.shape[0]).masked_fill_(taken.fired, 0)
        self.cursor, self.step, self.tokens = cursor, step + 1, self.tokens + x.shape[0]

    def save(self) -> None:
        """Write a checkpoint, once every step before it was looked at.

        Raises:
            StageError: a step went wrong; nothing is written.
        """
        self._look()
        tensors = {**self.stepping.state(), "since_fired": self.since_fired}
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

    def _point(self, x: Tensor, target: Tensor | None, terms: Mapping[str, Tensor], loss: Tensor) -> Point:
        """A point of the curve, on the batch and the parameters of this step."""
        point: Point = {"step": self.step, "tokens": self.tokens, **terms}
        point |= {"loss": loss, **glance(self.coder, self.parts, x, target)}
        return point | {"dead_fraction": self.dead.float().mean(), "lr": self.settings.lr_at(self.step)}

    def _look(self) -> None:
        """Publish the curve's points; stop the run if a step since the last look went wrong."""
        trouble = self.watch.look()
        good = [point for point in self._points if trouble is None or point["step"] < trouble.step]
        self._points = []
        for row in fetched(good):
            self.curve.add(row)
            self.run.metric(**row)  # type: ignore[arg-type]
        if trouble:
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
        self.stepping.restore(tensors)
        self.since_fired = tensors["since_fired"].to(self.device)
        self.step = self.resumed_at = int(state["step"])
        self.tokens = self.resumed_tokens = int(state["tokens"])
        self.cursor = Cursor(**state["cursor"])
        self.parts.count = int(state["parts"])
        self.coder.counts.update(state["counts"])
        self.watch.restore(state["watch"])
        self.rows.restore(state["rows"])
