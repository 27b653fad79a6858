"""Training curves as TensorBoard event files, for those who ask for them.

    pip install 'greatctl[tensorboard]'
    greatctl train --tensorboard

TensorBoard itself is then pointed at results/logs/tensorboard. Event files hold times and host names, so they lie
beside the artifacts and never in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..events import Event, Run

__all__ = ["tensorboard"]


@contextmanager
def tensorboard(run: Run, folder: Path) -> Iterator[Run]:
    """A run whose metric events are also written to event files in `folder`.

    Raises:
        UsageError: the package tensorboard is not installed.
    """
    writer_class = _writer_class()
    opened: list[Any] = []

    def emit(event: Event) -> None:
        run.emit(event)
        if event.kind != "metric":
            return
        values = dict(event.data)
        step = int(values.pop("step"))  # type: ignore[call-overload]
        if not opened:  # at the first point: a resumed run hides what an earlier one wrote beyond it
            opened.append(writer_class(log_dir=str(folder), purge_step=step))
        for name, value in values.items():
            opened[0].add_scalar(name, value, step)

    try:
        yield Run(run.stage, emit, run.stop)
    finally:
        for writer in opened:
            writer.close()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs the package tensorboard",
            why=str(error),
            fix="pip install 'greatctl[tensorboard]', or leave --tensorboard out: metrics.jsonl holds the same curve",
            code="missing-package",
        ) from error
    return SummaryWriter
