"""From rows to a finished SAE folder: choose the lengths, train, set thresholds, save, read back, measure.

What is measured is the folder as it was saved, opened again by the reader that everybody else uses; a fault
in folding or saving shows up in the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PluginError
from ..events import Run
from ..store.files import write_json
from ..store.tables import write_table
from .coder import Coder, CoderConfig
from .contract import check_contract
from .data import ActivationRows
from .evaluate import Edit, cross_entropy, evaluate
from .folder import Origin, Registry, load, save
from .trainer import Checkpoints, Settings, Trainer, build, default_dead_window, default_lr

__all__ = ["CHECKPOINTS", "Request", "default_batch_size", "produce", "settings_for"]

CHECKPOINTS = "checkpoints"
_BATCH, _SMALLEST_BATCH, _ENOUGH_STEPS = 4096, 256, 2000
_WARMUP_STEPS = 1000
_LOG_POINTS = 500


@dataclass(frozen=True)
class Request:
    """What to train. `length` is ("steps" | "tokens" | "epochs", number); None means: as fits the data."""

    cls: type[Coder]
    options: Mapping[str, object]
    length: tuple[str, int]
    lr: float | None = None
    batch_size: int | None = None
    checkpoint_every: int = 500
    seed: int = 0


def default_batch_size(rows: int, run_tokens: int | None) -> int:
    """4096, halved (to 256 at least) while a run has under 2000 steps or an epoch under 16 batches."""
    size = _BATCH
    while size > _SMALLEST_BATCH and (
        rows < 16 * size or (run_tokens is not None and run_tokens < _ENOUGH_STEPS * size)
    ):
        size //= 2
    return size


def settings_for(request: Request, rows: ActivationRows) -> Settings:
    """The run's lengths and rates in steps."""
    unit, number = request.length
    train = rows.counts.train
    tokens = {"epochs": number * train, "tokens": number}.get(unit)
    batch = request.batch_size or default_batch_size(train, tokens)
    if unit == "epochs":
        steps = rows.steps(request.seed, batch, number)
    else:
        steps = number if tokens is None else -(-tokens // min(batch, train))
    return Settings(
        steps=steps,
        batch_size=batch,
        lr=request.lr or default_lr(int(request.options["d_sae"]), steps),  # type: ignore[call-overload]
        warmup_steps=min(_WARMUP_STEPS, steps // 20),
        dead_window=default_dead_window(steps * min(batch, train), batch),
        checkpoint_every=request.checkpoint_every,
        log_every=max(1, steps // _LOG_POINTS),
        seed=request.seed,
    )


def produce(
    folder: Path,
    rows: ActivationRows,
    request: Request,
    origin: Origin,
    run: Run,
    *,
    registry: Registry | None = None,
    ce: Callable[[Edit | None], float] | None = None,
    facts: Mapping[str, object] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, object]:
    """Train in `folder` (taking up its checkpoints) and write the SAE and its tables there; whoever seals the folder
    discards the checkpoints.

    Args:
        ce: see `greatctl.sae.evaluate.cross_entropy`; None = not measured.
        facts: more for training.json.

    Returns:
        The stage's summary.
    """
    settings = settings_for(request, rows)
    _say(run, rows, request, settings)
    coder = build(request.cls, _config(request, settings), request.seed)
    check_contract(coder)
    trainer = Trainer(coder, rows, settings, Checkpoints(folder / CHECKPOINTS), run, device)
    if trainer.resumed_at:
        run.notice(f"train: resumed at step {trainer.resumed_at:,} of {settings.steps:,}")
    rate = trainer.fit()
    held_out = rows.held_out()
    if held_out.shape[0]:
        coder.calibrate(held_out.to(device) * trainer.scale)
    save(folder, coder, trainer.scale, origin)
    sae = load(folder, registry, device=device)
    measured = evaluate(sae, held_out, device=device)
    nothing = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "ce_loss_recovered"))
    measured |= cross_entropy(ce, sae) if ce else nothing
    dead = float(trainer.dead.float().mean())
    measured |= {"dead_fraction": dead, "dead_window": settings.dead_window}
    _warn(run, dead, measured)
    write_json(folder / "evaluation.json", measured)
    write_json(folder / "training.json", _record(trainer, rows, origin, facts or {}))
    write_table(folder / "metrics.parquet", _columns(trainer.log))
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
        "tokens_per_second": round(rate, 1) if trainer.step > trainer.resumed_at else None,
    }


def _config(request: Request, settings: Settings) -> CoderConfig:
    """The architecture's config; a penalty's warm-up is a share of the run."""
    options: dict[str, Any] = dict(request.options)
    if options.get("l1_warmup_steps") == 0:
        options["l1_warmup_steps"] = settings.steps // 20
    try:
        return request.cls.Config(**options)
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"architecture {request.cls.name!r} refuses its configuration",
            why=str(error),
            fix="its Config must derive from greatctl.sae.coder.CoderConfig",
        ) from error


def _say(run: Run, rows: ActivationRows, request: Request, settings: Settings) -> None:
    counts = rows.counts
    run.notice(
        f"train: {counts.train:,} rows; {counts.held_out:,} held out, {counts.special:,} special and "
        f"{counts.outliers:,} outlying rows left out; gamma {rows.gamma:.2f}"
    )
    if request.batch_size is None and settings.batch_size < _BATCH:
        run.notice(f"train: the data is small, so a batch has {settings.batch_size} rows instead of {_BATCH}")
    reads = settings.steps * min(settings.batch_size, counts.train) / counts.train
    if reads > 1.05:
        run.notice(f"train: each row is read {reads:.1f} times; judge by the held-out numbers, not by the curve")


def _warn(run: Run, dead: float, measured: Mapping[str, object]) -> None:
    if not measured["rows"]:
        run.notice("train: nothing is held out, so the SAE could not be measured")
    if dead == 1:
        run.notice("train: all latents are dead; use a lower --lr, or a smaller --l1-coefficient")
    elif dead > 0.5:
        run.notice(f"train: {dead:.0%} of the latents are dead; use fewer latents (--expansion) or more text")


def _record(trainer: Trainer, rows: ActivationRows, origin: Origin, facts: Mapping[str, object]) -> dict[str, object]:
    """training.json: how the SAE was made. Equal runs write equal bytes, so no time or rate is in it."""
    coder = trainer.coder
    threshold = getattr(coder, "threshold", None)
    scalar = float(threshold) if isinstance(threshold, Tensor) and threshold.numel() == 1 else None
    settings = asdict(trainer.settings)
    settings.pop("checkpoint_every")
    return {
        "arch": coder.name,
        "config": coder.config.model_dump(mode="json"),
        "settings": settings,
        "hook_point": origin.hook_point,
        "model": origin.model_name,
        "scale": trainer.scale,
        "threshold": None if scalar is None else scalar / trainer.scale,
        "rows": asdict(rows.counts),
        "median_norm": rows.median_norm,
        "gamma": rows.gamma,
        "tokens": trainer.tokens,
        "epochs": trainer.tokens / rows.counts.train,
        "counts": dict(coder.counts),
        **facts,
    }


def _columns(log: list[dict[str, float]]) -> dict[str, list]:
    """The curve by columns, in an order that does not depend on which part of it came from a checkpoint."""
    names = ["step", "tokens", *sorted({name for row in log for name in row} - {"step", "tokens"})]
    return {name: [row.get(name) for row in log] for name in names}
