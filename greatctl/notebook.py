"""The same experiment from a notebook: open a project, look at its tables, run one stage.

    import greatctl as g

    p = g.open("greatctl-demo")
    p.artifacts().to_pandas()                  what is sealed, and where
    p.features().hypotheses                    any Parquet table as a pyarrow table
    p.tables("tokenize").documents             those of any other stage
    p.saes["batchtopk-2048-k32"].encode(x)     an autoencoder, ready to use
    p.run("train", arch="topk", k=16, say=print).summary

Nothing is read before it is asked for, and importing this costs no torch. Settings come from where the command line takes
them (what is given here, then the environment, then sources.toml). Errors are those of `greatctl.errors`, with why and fix
as notes below them; interrupting the kernel once stops a stage at its next safe point, twice at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import manifest as manifests
from .errors import GreatctlError, InputError, UsageError, did_you_mean
from .events import Emit, Event, Run, silent
from .settings import project_paths, resolve, resolve_device
from .stages.context import STAGES, Context, Project, Result

if TYPE_CHECKING:
    import pyarrow as pa

    from .extend.manager import Plugins
    from .sae.folder import LoadedSAE

__all__ = ["OpenProject", "Saes", "Tables", "open", "spoken"]

_EVERY = 10.0  # seconds between two lines of progress in a notebook's cell


def open(
    folder: str | Path = ".", *, data_dir: str | Path | None = None, results_dir: str | Path | None = None
) -> OpenProject:
    """Open the project in `folder`: the folder that holds sources.toml, data and results.

    Without a sources.toml there the packaged one counts, as at the command line. Nothing is created or changed.

    Args:
        data_dir, results_dir: where its data and results lie, if not where the environment or sources.toml say.

    Raises:
        InputError: there is no such folder.
        ManifestError: its sources.toml is invalid.
    """
    root = Path(folder).expanduser().absolute()
    with _explained():
        if not root.is_dir():
            fix = f"give the folder of a sources.toml, or make one: greatctl -C {root} init"
            raise InputError(f"{root} is not a folder", why="a project is one", fix=fix, where=str(root))
        path = root / "sources.toml"
        manifest = manifests.load(path if path.exists() else manifests.packaged_path())
        data_dir, results_dir = (Path(place) if place else None for place in (data_dir, results_dir))
        data, results, _ = project_paths(root, manifest, data_dir, results_dir, os.environ)
    return OpenProject(Project(root, manifest, data, results))


@dataclass(frozen=True)
class OpenProject:
    """A project: its folders in `project`, its artifacts, and its stages."""

    project: Project

    def __repr__(self) -> str:
        return f"greatctl.open({str(self.project.root)!r})"

    @cached_property
    def plugins(self) -> Plugins:
        """Built-ins, installed plugins, and those of the project; loaded once."""
        from .extend.manager import load_plugins

        return load_plugins(folder=self.project.root)

    def artifacts(self) -> pa.Table:
        """What is sealed, oldest first: stage, name, path, bytes, fingerprint."""
        import pyarrow as pa

        from .store.artifact import sealed_under

        found = [*sealed_under(self.project.data), *sealed_under(self.project.results)]
        rows = [
            {
                "stage": a.stage,
                "name": a.path.name,
                "path": str(a.path),
                "bytes": sum(row["bytes"] for row in a.outputs),
                "fingerprint": a.fingerprint,
            }
            for a in found
        ]
        kinds = {"stage": pa.string(), "name": pa.string(), "path": pa.string(), "bytes": pa.int64()}
        return pa.Table.from_pylist(rows, schema=pa.schema({**kinds, "fingerprint": pa.string()}))

    @property
    def saes(self) -> Saes:
        """The trained autoencoders by name."""
        return Saes(self)

    def features(self, name: str | None = None) -> Tables:
        """The feature tables of an SAE (default: the newest): latents, examples, units, contrasts, hypotheses, …

        `labels` and `exams` are among them where a labeler named latents.

        Raises:
            InputError: there are none under that name, or they are damaged.
        """
        return self._tables(self.project.features, "interpret", name)

    def patches(self, name: str | None = None) -> Tables:
        """The tables of a patching run (default: the newest): effects, cells, …. Errors as `features`."""
        return self._tables(self.project.patches, "patch", name)

    def tables(self, stage: str, name: str | None = None) -> Tables:
        """The Parquet tables of any artifact, by the stage and name that `artifacts` lists (default: the newest).

        Errors as `features`.
        """
        from .store.artifact import sealed_under

        roots = [root for root in (self.project.data, self.project.results) if sealed_under(root, stage)]
        return self._tables(roots[0] if roots else self.project.results, stage, name)

    def run(
        self,
        stage: str,
        *,
        device: str | None = None,
        force: bool = False,
        offline: bool = False,
        say: Callable[[str], object] | None = None,
        emit: Emit = silent,
        **settings: object,
    ) -> Result:
        """Run one stage as `greatctl STAGE` would; what is sealed already is not made again.

        Args:
            stage: fetch, tokenize, harvest, train, interpret, patch or report.
            device: auto, cpu, cuda, cuda:N or mps.
            force: make it anew although it is up to date.
            offline: open no connection.
            say: is told what happens in words: every notice, and the progress every ten seconds. `say=print` suits a
                notebook; the default is silence.
            emit: is told every event (see `greatctl.events`), for programs.
            settings: the stage's flags, with `_` for `-`: `d_sae=256` for `--d-sae 256`.

        Returns:
            The result: `artifact` (its folder), `summary`, `up_to_date`.

        Raises:
            UsageError: no such stage or setting.
            InterruptedRun: the kernel was interrupted; the same call goes on from there.
            GreatctlError: as the stage.
        """
        with _explained():
            if stage not in STAGES:
                raise UsageError(f"{stage!r} is not a stage", why="these are", fix=did_you_mean(stage, STAGES))
            module = importlib.import_module(f"greatctl.stages.{stage}")
            known = module.Config.model_fields
            if strange := sorted(set(settings) - set(known)):
                raise UsageError(
                    f"{stage} has no setting {strange[0]!r}",
                    why="settings are the stage's flags",
                    fix=did_you_mean(strange[0], known),
                )
            manifest = self.project.manifest
            resolved = resolve(module.Config, stage, flags=settings, manifest=manifest, environ=os.environ)
            place, _ = resolve_device(stage, flag=device, manifest=manifest, environ=os.environ)
            run = Run(stage, _heard_by(emit, spoken(say) if say else silent, self.plugins.observe))
            context = Context(self.project, self.plugins, run, resolved.origins, force, offline, place)
            with _interruptible(run):
                return module.run(context, resolved.config)

    def _tables(self, root: Path, stage: str, name: str | None) -> Tables:
        from .stages.labels import labels_of
        from .store.artifact import sealed_under

        with _explained():
            found = {artifact.path.name: artifact for artifact in sealed_under(root, stage)}
            if not found or name not in (None, *found):
                raise InputError(
                    f"there are no tables of {stage}" + (f" named {name!r}" if name else " yet"),
                    why=f"below {root}",
                    fix=did_you_mean(name, found) if name and found else self._how_to_make(stage),
                )
            artifact = (found[name] if name else list(found.values())[-1]).check()
            labels = labels_of(self.project, artifact) if stage == "interpret" else None
        named = [labels.path / f"{table}.parquet" for table in ("labels", "exams")] if labels else []
        return Tables(artifact.path, [file for file in named if file.exists()])

    def _how_to_make(self, stage: str) -> str:
        if stage in STAGES:
            return f'run("{stage}") makes them'
        return did_you_mean(stage, sorted({*STAGES, *self.artifacts()["stage"].to_pylist()}))


class Saes(Mapping[str, "LoadedSAE"]):
    """The trained autoencoders of a project; one is loaded when it is taken."""

    def __init__(self, opened: OpenProject) -> None:
        self._opened = opened

    def __getitem__(self, name: str) -> LoadedSAE:
        if name not in list(self):
            raise KeyError(f"{name!r}; there are: {', '.join(self) or 'none'}")
        from .sae.folder import load

        return load(self._opened.project.saes / name, self._opened.plugins.registry)

    def __iter__(self) -> Iterator[str]:
        from .store.artifact import sealed_under

        return iter([artifact.path.name for artifact in sealed_under(self._opened.project.saes, "train")])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"<autoencoders: {', '.join(self) or 'none'}>"


class Tables:
    """The Parquet tables of an artifact: each is an attribute (`.hypotheses`) that reads a `pyarrow.Table`.

    `names` lists them, `path` is the folder (for `duckdb.read_parquet` and the like), `.to_pandas()` makes a data frame.
    """

    def __init__(self, path: Path, more: Sequence[Path] = ()) -> None:
        self.path = path
        self._files = {file.stem: file for file in [*sorted(path.glob("*.parquet")), *more]}

    @property
    def names(self) -> list[str]:
        """The tables that are there."""
        return list(self._files)

    def __getattr__(self, name: str) -> Any:
        files = self.__dict__.get("_files", {})
        if name not in files:
            raise AttributeError(f"no table {name!r}; there are: {', '.join(files)}")
        import pyarrow.parquet as pq

        return pq.read_table(files[name])

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *self._files])

    def page(self, latent: int) -> dict[str, object]:
        """Everything that feature tables say about one latent, as JSON values."""
        from .features.page import latent_page

        return latent_page(self.path, latent)

    def __repr__(self) -> str:
        return f"<tables of {self.path.name}: {', '.join(self._files)}>"


def spoken(say: Callable[[str], object], every: float = _EVERY) -> Emit:
    """An `Emit` that tells `say` every notice, and how far things are at most once in `every` seconds."""
    began: dict[str, tuple[float, float]] = {}
    said = time.monotonic()

    def emit(event: Event) -> None:
        nonlocal said
        if event.kind in ("notice", "skipped"):
            say(event.message)
        if event.kind != "progress":
            return
        done, total = (float(event.data[name]) for name in ("done", "total"))  # type: ignore[arg-type]
        now = time.monotonic()
        start, first = began.setdefault(event.message, (now, done))
        if total and done >= total:
            del began[event.message]  # what comes under the same name is another task
        if now - said < every:
            return
        said = now
        rate = (done - first) / (now - start) if now > start else 0.0
        left = f", {(total - done) / rate:,.0f} s left" if rate > 0 and total > done else ""
        of = f" of {total:,.0f}" if total else ""
        say(f"{event.stage}: {event.message}: {done:,.0f}{of} {event.data['unit']}".rstrip() + left)

    return emit


def _heard_by(*listeners: Emit) -> Emit:
    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


@contextmanager
def _explained() -> Iterator[None]:
    """Let a traceback show why and fix of an error, which the command line prints and a notebook would drop."""
    try:
        yield
    except GreatctlError as error:
        for name in ("why", "fix"):
            note = f"{name}: {getattr(error, name)}"
            if getattr(error, name) and note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


@contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """Turn the first interrupt of the kernel into a request to stop; the second is Python's own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        run.stop.request(number)
        run.notice("stopping at the next safe point (once more to stop at once)")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
