"""From rows to a finished SAE folder: choose the lengths, train, set thresholds, save, read back, measure.

`produce` does it for one SAE; `begin` and `finish` are its two ends, between which several may be trained in one walk
over the rows.

What is measured is the folder as it was saved, opened again by the reader that everybody else uses; a fault
in folding or saving shows up in the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PluginError
from ..events import Run
from ..store.files import write_json
from ..store.tables import write_table
from .checkpoints import Checkpoints
from .coder import Coder, CoderConfig
from .contract import check_contract
from .curve import Curve, columns
from .evaluate import Edit, cross_entropy, evaluate, write_evaluation
from .folder import Origin, Registry, load, save
from .rows import Rows
from .schedule import LARGEST_BATCH, Settings, default_batch_size, default_dead_window, default_lr
from .setup import build
from .trainer import Trainer
from .walk import walk

__all__ = ["CHECKPOINTS", "HeldOut", "Request", "begin", "default_batch_size", "finish", "produce", "settings_for"]

CHECKPOINTS = "checkpoints"
_WARMUP_STEPS = 1000
_LOG_POINTS = 500
_WARMUP_FIELDS = ("l1_warmup_steps", "l0_warmup_steps")  # 0 in an architecture's config: a share of the run


@dataclass(frozen=True)
class Request:
    """What to train. `length` is ("steps" | "tokens" | "epochs", number); None means: as fits the data.

    `frozen_decoder` leaves the decoder as it was drawn (a control); `shuffle_seed` is `seed` where it is None.
    """

    cls: type[Coder]
    options: Mapping[str, object]
    length: tuple[str, int]
    lr: float | None = None
    batch_size: int | None = None
    checkpoint_every: int = 500
    seed: int = 0
    frozen_decoder: bool = False
    shuffle_seed: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """What an SAE is measured on: rows [n, d_in] and targets [n, d_out] or None, float32; the window [n] of each."""

    rows: Tensor
    target: Tensor | None
    windows: Tensor

    @classmethod
    def of(cls, rows: Rows) -> HeldOut:
        """The held-out part of `rows`, read once."""
        return cls(rows.held_out(), rows.held_out_target(), rows.held_out_windows())


def settings_for(request: Request, rows: Rows) -> Settings:
    """The run's lengths and rates in steps."""
    unit, number = request.length
    train = rows.counts.train
    tokens = {"epochs": number * train, "tokens": number}.get(unit)
    batch = request.batch_size or default_batch_size(train, tokens)
    order = request.seed if request.shuffle_seed is None else request.shuffle_seed
    a_pass = rows.steps(order, batch, 1)  # batches are of equal size, so a step has train / a_pass rows
    steps = number
    if unit == "epochs":
        steps = rows.steps(order, batch, number)
    elif unit == "tokens":
        steps = -(-number * a_pass // train)
    return Settings(
        steps=steps,
        batch_size=batch,
        lr=request.lr or _default_lr(request, steps),
        warmup_steps=min(_WARMUP_STEPS, steps // 20),
        dead_window=default_dead_window(steps * train // a_pass, batch),
        checkpoint_every=request.checkpoint_every,
        log_every=max(1, steps // _LOG_POINTS),
        seed=request.seed,
        shuffle_seed=request.shuffle_seed,
    )


def _default_lr(request: Request, steps: int) -> float:
    d_sae = int(request.options["d_sae"])  # type: ignore[call-overload]
    return default_lr(d_sae, steps, reads_target=request.cls.reads_target)


def produce(
    folder: Path,
    rows: Rows,
    request: Request,
    origin: Origin,
    run: Run,
    *,
    registry: Registry | None = None,
    ce: Callable[[Edit | None], float] | None = None,
    facts: Mapping[str, object] | None = None,
    device: str | torch.device = "cpu",
    labels: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, object]:
    """Train in `folder` (taking up its checkpoints) and write the SAE and its tables there; whoever seals the folder
    discards the checkpoints.

    Args:
        ce: see `greatctl.sae.evaluate.cross_entropy`; None = not measured.
        facts: more for training.json.
        labels: name of a grouping -> the label of each window; measurements are also given by group.

    Returns:
        The stage's summary.

    Raises:
        StageError: training diverged, or its weights are not finite; nothing is written.
    """
    trainer = begin(folder, rows, request, run, device)
    walked = walk([trainer])
    run.notice(f"train: waited for rows: {walked.waited / walked.seconds:.1%}")
    rows.release()
    summary = finish(
        folder, trainer, HeldOut.of(rows), origin, registry=registry, ce=ce, facts=facts, labels=labels
    )  # fmt: skip
    trained = trainer.step > trainer.resumed_at
    rate = (trainer.tokens - trainer.resumed_tokens) / walked.seconds
    return {
        **summary,
        "tokens_per_second": round(rate, 1) if trained else None,
        "waited_for_rows": round(walked.waited / walked.seconds, 4),
    }


def begin(folder: Path, rows: Rows, request: Request, run: Run, device: str | torch.device = "cpu") -> Trainer:
    """A trainer for `request`, at the newest checkpoint in `folder`.

    Raises:
        PluginError: the architecture breaks its contract.
        ResourceError: the coder does not fit the device.
    """
    settings = settings_for(request, rows)
    _say(run, rows, request, settings)
    coder = build(request.cls, _config(request, settings), request.seed)
    coder.frozen_decoder = request.frozen_decoder
    check_contract(coder)
    curve = Curve(folder / "metrics.jsonl")
    trainer = Trainer(coder, rows, settings, Checkpoints(folder / CHECKPOINTS), run, device, curve)
    if trainer.resumed_at:
        run.notice(f"train: resumed at step {trainer.resumed_at:,} of {settings.steps:,}")
    return trainer


def finish(
    folder: Path,
    trainer: Trainer,
    held_out: HeldOut,
    origin: Origin,
    *,
    registry: Registry | None = None,
    ce: Callable[[Edit | None], float] | None = None,
    facts: Mapping[str, object] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, object]:
    """Calibrate, save and measure what `trainer` has learnt; arguments and result as of `produce`, less the rate.

    Raises:
        StageError: its weights are not finite.
    """
    coder, settings, run = trainer.coder, trainer.settings, trainer.run
    if held_out.rows.shape[0]:
        coder.calibrate(held_out.rows.to(trainer.device) * trainer.scale)
    save(folder, coder, trainer.scale, origin, target_scale=trainer.target_scale)
    measured = _measure(folder, held_out, labels or {}, ce, registry, trainer.device)
    dead = float(trainer.dead.float().mean())
    measured |= {"dead_fraction": dead, "dead_window": settings.dead_window}
    _warn(run, dead, measured)
    write_evaluation(folder, measured)
    write_json(folder / "training.json", _record(trainer, trainer.rows, origin, facts or {}))
    write_table(folder / "metrics.parquet", columns(trainer.log))
    return {
        "arch": coder.name,
        "d_sae": coder.config.d_sae,
        "hook_point": origin.hook_point,
        "l0": measured["l0"],
        "explained_variance": measured["explained_variance"],
        "dead_fraction": dead,
        "ce_loss_recovered": measured["ce_loss_recovered"],
        "steps": settings.steps,
        "tokens": trainer.tokens,
        "stepping": trainer.stepping.name,
    }


def _measure(
    folder: Path,
    held_out: HeldOut,
    labels: Mapping[str, Sequence[str]],
    ce: Callable[[Edit | None], float] | None,
    registry: Registry | None,
    device: str | torch.device,
) -> dict[str, Any]:
    """The saved folder, opened again and measured on held-out rows."""
    sae = load(folder, registry, device=device)
    windows: list[int] = held_out.windows.tolist()
    groups = {grouping: [of[window] for window in windows] for grouping, of in labels.items()}
    measured = evaluate(sae, held_out.rows, target=held_out.target, groups=groups, device=device)
    wanted = held_out.rows if held_out.target is None else held_out.target
    if ce is None:
        return measured | dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "ce_loss_recovered"))
    return measured | cross_entropy(ce, sae, mean=wanted.mean(dim=0) if wanted.shape[0] else None)


def _config(request: Request, settings: Settings) -> CoderConfig:
    """The architecture's config; a penalty's warm-up is a share of the run."""
    options: dict[str, Any] = dict(request.options)
    options |= {name: settings.steps // 20 for name in _WARMUP_FIELDS if options.get(name) == 0}
    try:
        return request.cls.Config(**options)
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"architecture {request.cls.name!r} refuses its configuration",
            why=str(error),
            fix="its Config must derive from greatctl.sae.coder.CoderConfig",
        ) from error


def _say(run: Run, rows: Rows, request: Request, settings: Settings) -> None:
    counts = rows.counts
    run.notice(
        f"train: {counts.train:,} rows; {counts.held_out:,} held out, {counts.special:,} special and "
        f"{counts.outliers:,} outlying rows left out; gamma {rows.gamma:.2f}"
    )
    if request.batch_size is None and settings.batch_size < LARGEST_BATCH:
        run.notice(f"train: the data is small, so a batch has {settings.batch_size} rows instead of {LARGEST_BATCH}")
    elif settings.batch_size > counts.train:
        run.notice(f"train: a batch has {counts.train} rows instead of {settings.batch_size}: there are no more")
    reads = settings.steps / rows.steps(settings.order, settings.batch_size, 1)
    if reads > 1.05:
        run.notice(f"train: each row is read {reads:.1f} times; judge by the held-out numbers, not by the curve")


def _warn(run: Run, dead: float, measured: Mapping[str, object]) -> None:
    if not measured["rows"]:
        run.notice("train: nothing is held out, so the SAE could not be measured")
    if dead == 1:
        run.notice("train: all latents are dead; use a lower --lr, or a smaller --l1-coefficient")
    elif dead > 0.5:
        run.notice(f"train: {dead:.0%} of the latents are dead; use fewer latents (--expansion) or more text")
    explained = measured["explained_variance"]
    if isinstance(explained, float) and explained < 0:
        run.notice("train: the SAE explains less than the mean does; try a lower --lr or more steps")


def _record(trainer: Trainer, rows: Rows, origin: Origin, facts: Mapping[str, object]) -> dict[str, object]:
    """training.json: how the SAE was made. Equal runs write equal bytes, so no time or rate is in it."""
    coder = trainer.coder
    threshold = getattr(coder, "threshold", None)
    scalar = float(threshold) if isinstance(threshold, Tensor) and threshold.numel() == 1 else None
    paired = origin.target_hook_point is not None
    settings = asdict(trainer.settings)
    settings.pop("checkpoint_every")
    if settings["shuffle_seed"] is None:
        settings.pop("shuffle_seed")
    return {
        "arch": coder.name,
        "config": coder.config.model_dump(mode="json"),
        "settings": settings,
        "hook_point": origin.hook_point,
        "model": origin.model_name,
        "scale": trainer.scale,
        **({"target_hook_point": origin.target_hook_point, "target_scale": trainer.target_scale} if paired else {}),
        "threshold": None if scalar is None else scalar / trainer.scale,
        "rows": asdict(rows.counts),
        "median_norm": rows.median_norm,
        "gamma": rows.gamma,
        "tokens": trainer.tokens,
        "epochs": trainer.tokens / rows.counts.train,
        "counts": dict(coder.counts),
        **rows.state(),
        **facts,
    }
