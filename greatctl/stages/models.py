"""From the name that a person gives to an open model, the same way for every stage.

`bundled` is the small model that comes with greatctl. A relative folder means the current folder when it was
given as a flag or in the environment, and the manifest's folder when it stands in sources.toml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, ResourceError, UsageError
from ..model.interface import Site
from .context import Context

if TYPE_CHECKING:
    from ..model.interface import FrozenModel

__all__ = ["BUNDLED", "chosen_model", "open_model", "open_recorded", "pick_device", "resolve", "slug"]

BUNDLED = "bundled"
_SHARE = 0.8  # of a GPU's free memory that weights may take; the rest is for what is computed


def resolve(name: str, *, base: Path | None = None) -> tuple[str | Path, str]:
    """A model's source (folder or hub id) and its name (`bundled`, an absolute folder or the hub id).

    Args:
        base: folder that a relative path starts from; default the current one.

    Raises:
        InputError: the bundled model is not in this installation.
    """
    if name == BUNDLED:
        from ..reference import model_dir

        folder = Path(model_dir())
        if not (folder / "config.json").is_file():
            fix = "install greatctl again, or name another model with --model"
            raise InputError("the bundled model is missing", why=f"{folder} holds no model", fix=fix)
        return folder, BUNDLED
    path = Path(name).expanduser()
    path = path if path.is_absolute() or base is None else base / path
    if path.is_dir() or name.startswith((".", "/", "~")):
        return path.resolve(), str(path.resolve())
    return name, name


def chosen_model(ctx: Context, value: str | None, *, fallback: str | None = None) -> tuple[str | Path, str]:
    """`resolve` a stage's `model` setting; else `fallback`, else the manifest's `[model] name`."""
    manifest = ctx.project.manifest
    beside = manifest.path.parent
    if value is not None:
        return resolve(value, base=beside if ctx.origins.get("model", "").startswith("sources.toml") else None)
    if fallback is not None:
        return resolve(fallback)
    return resolve(manifest.model_name, base=beside)


def open_model(
    ctx: Context, name: str, *, engine: str = "auto", dtype: str = "auto", upto: int | None = None
) -> FrozenModel:
    """Load the model called `name` (as `resolve` or a meta.json spells it) on the context's device.

    `cuda` without a number means all GPUs: a model that one of them cannot hold is spread over all (lean engine).

    Raises: as `greatctl.model.load` and `pick_device`.
    """
    source, display = resolve(name)
    device = pick_device(ctx.device)
    from .. import model

    spread = None
    if device == "cuda":
        info = model.describe(source, name=display, offline=ctx.offline)
        if model.choose_engine(engine, info.family) == "lean":
            size = model.weight_bytes(source, info, dtype=dtype, upto=upto, offline=ctx.offline)
            spread = _spread(ctx, display, size)
    return model.load(
        source,
        name=display,
        device=device,
        dtype=dtype,
        engine=engine,
        upto=upto,
        device_map=spread,
        offline=ctx.offline,
    )


def _spread(ctx: Context, name: str, size: int) -> str | None:
    """`auto` where weights of `size` bytes do not fit on the first GPU, said aloud; else None."""
    import torch

    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    if size <= _SHARE * free[0]:
        return None
    where = f"{len(free)} GPUs" if len(free) > 1 else "the GPU"
    beyond = "" if size <= _SHARE * sum(free) else " and main memory, which is slow"
    ctx.run.notice(
        f"{ctx.run.stage}: {name} takes {size / 2**30:.1f} GiB and the first GPU has {free[0] / 2**30:.1f} GiB free, "
        f"so its blocks are spread over {where}{beyond}"
    )
    return "auto"


def open_recorded(
    ctx: Context,
    name: str,
    revision: str | None,
    *,
    what: str = "the activations",
    upto: int | None = None,
    sites: Sequence[str] = (),
) -> FrozenModel:
    """`open_model`, held against the revision that `what` were made with (None: not recorded, so not compared).

    With `sites` that the lean engine does not know (what an MLP reads, say), TransformerLens runs it.

    Raises:
        InputError: the model under that name is another one now.
    """
    lean = all(Site.parse(site).is_lean for site in sites)
    model = open_model(ctx, name, engine="auto" if lean else "transformer-lens", upto=upto)
    if revision is not None and model.revision != revision:
        raise InputError(
            f"{name} is not the model that was harvested",
            why=f"it is revision {model.revision[:12]}, but {what} are of {revision[:12]}",
            fix="bring the former model back, or run `greatctl harvest` and the stages after it again",
        )
    return model


def pick_device(wanted: str = "auto") -> str:
    """A torch device name. `auto` is CUDA or else the CPU (MPS lacks float64, so only on request).

    Raises:
        ResourceError: the device is not there.
        UsageError: it is no device.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise UsageError(f"unknown device {wanted!r}", why="it is no device", fix="use auto, cpu, cuda, cuda:N or mps")
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }[kind]
    if not there:
        raise ResourceError(
            f"there is no device {wanted}",
            why=f"torch {torch.__version__} does not see it here",
            fix="use --device cpu",
        )
    return wanted


def slug(name: str) -> str:
    """A model's folder name under data/: the last part of its name, safe on every disk."""
    last = name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-") or "model"
