"""The same experiment from a notebook: open a project, look at its tables, run one stage.

    import greatctl as g

    p = g.open("greatctl-demo")
    p.artifacts().to_pandas()                  what is sealed, and where
    p.features().hypotheses                    any Parquet table as a pyarrow table
    p.saes["batchtopk-2048-k32"].encode(x)     an autoencoder, ready to use
    p.run("train", arch="topk", k=16).summary  one stage with the settings of its flags

Nothing is read before it is asked for, and importing this costs no torch. Settings come from where the command line takes
them (what is given here, then the environment, then sources.toml); errors are those of `greatctl.errors`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import manifest as manifests
from .errors import InputError, UsageError, did_you_mean
from .events import Emit, Run, silent
from .settings import project_paths, resolve, resolve_device
from .stages.context import STAGES, Context, Project, Result

if TYPE_CHECKING:
    import pyarrow as pa

    from .extend.manager import Plugins
    from .sae.folder import LoadedSAE

__all__ = ["OpenProject", "Saes", "Tables", "open"]


def open(
    folder: str | Path = ".", *, data_dir: str | Path | None = None, results_dir: str | Path | None = None
) -> OpenProject:
    """Open the project in `folder` (with the packaged sources.toml where it has none).

    Args:
        data_dir, results_dir: where its data and results lie, if not where the environment or sources.toml say.

    Raises:
        InputError: there is no such folder.
        ManifestError: its sources.toml is invalid.
    """
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder", why="a project is the folder of a sources.toml", where=str(root))
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
        """The feature tables of an SAE (default: the newest): latents, examples, hypotheses, …, and labels if any.

        Raises:
            InputError: there are none under that name.
        """
        return self._tables(self.project.features, "interpret", name)

    def patches(self, name: str | None = None) -> Tables:
        """The tables of a patching run (default: the newest): effects, cells, …. Errors as `features`."""
        return self._tables(self.project.patches, "patch", name)

    def run(
        self,
        stage: str,
        *,
        device: str | None = None,
        force: bool = False,
        offline: bool = False,
        emit: Emit = silent,
        **settings: object,
    ) -> Result:
        """Run one stage as `greatctl STAGE` would; `settings` are its flags with `_` for `-`.

        Args:
            emit: is told what happens (`print` shows everything); the default is silence.

        Returns:
            The result: `artifact` (its folder), `summary`, `up_to_date`.

        Raises:
            UsageError: no such stage or setting; else as the stage.
        """
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
        context = Context(self.project, self.plugins, Run(stage, emit), resolved.origins, force, offline, place)
        return module.run(context, resolved.config)

    def _tables(self, root: Path, stage: str, name: str | None) -> Tables:
        from .stages.labels import labels_of
        from .store.artifact import sealed_under

        found = {artifact.path.name: artifact for artifact in sealed_under(root, stage)}
        if not found or name not in (None, *found):
            raise InputError(
                f"there are no tables of {stage}" + (f" named {name!r}" if name else " yet"),
                why=f"below {root}",
                fix=did_you_mean(name, found) if name and found else f'run("{stage}") makes them',
            )
        artifact = found[name] if name else list(found.values())[-1]
        labels = labels_of(self.project, artifact) if stage == "interpret" else None
        return Tables(artifact.check().path, labels.path / "labels.parquet" if labels else None)


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
    """A folder of Parquet tables; each is an attribute (`.hypotheses`) and a `pyarrow.Table`."""

    def __init__(self, path: Path, labels: Path | None = None) -> None:
        self.path = path
        self._files = {file.stem: file for file in [*sorted(path.glob("*.parquet")), *([labels] if labels else [])]}

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
