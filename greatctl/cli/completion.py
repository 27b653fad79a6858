"""What the Tab key offers: the names that this project, the packaged material and the plugins really have.

It must be quick and may be asked for in a folder that nobody trusts, so nothing here imports torch, a stage or a plugin:
names come from folder names, from small JSON files, from sources.toml, and from reading (never running) plugin files for
the names that they register. Whatever cannot be read offers nothing, since a shell has no place for an error.
"""

from __future__ import annotations

import ast
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from .text import visible

__all__ = ["CHOICES", "completer"]

Offer = tuple[str, str]  # a value and a word about it
Complete = Callable[[typer.Context, str], list[Offer]]

STAGES = ("fetch", "tokenize", "harvest", "train", "interpret", "patch", "report")
CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("tokenize", "overlap"): ("remove", "keep"),
    ("tokenize", "export"): ("pt", "datasets", "parquet"),
    ("harvest", "dtype"): ("auto", "float32", "bfloat16", "float16"),
    ("harvest", "compile"): ("auto", "on", "off"),
    ("harvest", "engine"): ("auto", "lean", "transformer-lens"),
    ("train", "export"): ("saelens", "sparsify", "dictionary_learning", "pth"),
    ("interpret", "unit"): ("author", "subject"),
    ("interpret", "export"): ("neuronpedia",),
    ("patch", "site"): (
        "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "mlp_post",
        "latents", "edges",
    ),
    ("patch", "positions"): ("each", "spans", "all"),
    ("patch", "direction"): ("both", "denoising", "noising"),
    ("patch", "corruption"): ("counterpart", "zero", "mean", "resample"),
    ("patch", "method"): ("exact", "attribution", "attribution-qk", "attribution-drop", "eap-ig", "eap-ig-activations"),
    ("patch", "circuit_kind"): ("edges", "nodes", "latents"),
    ("patch", "selection"): ("threshold", "greedy"),
    ("report", "format"): ("html", "md", "json"),
    ("steer", "against"): ("diff-means", "random", "prompt", "none"),
}  # fmt: skip
"""The settings that take one of a few words, by stage and name. A test holds them against the stages' own schemas."""

_DEVICES = ("auto", "cpu", "cuda", "mps")
_SWEPT = ("arch=", "k=", "lr=", "seed=", "d_sae=", "hook_point=")
_PLACES = ("hook_resid_post", "hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out", "mlp.hook_post")
_HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
_PACKAGE = Path(__file__).resolve().parents[1]


def completer(command: str, name: str) -> Complete | None:
    """What completes the option `name` of `command`; None where the shell's own completion (files) is the best."""
    if found := CHOICES.get((command, name)):
        return _words(found)
    return _SPECIAL.get((command, name)) or _BY_NAME.get(name)


def _words(words: Sequence[str]) -> Complete:
    return lambda ctx, incomplete: [(word, "") for word in words]


@dataclass(frozen=True)
class _Project:
    """Where things are and what sources.toml says, unchecked: checking it takes longer than a person waits for Tab."""

    root: Path
    data: Path
    results: Path
    manifest: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The manifest's model."""
        return str(self.manifest.get("model", {}).get("name", "meta-llama/Meta-Llama-3-8B"))


def _of_project(offers: Callable[[_Project, typer.Context], Iterable[Offer]]) -> Complete:
    """A completer that reads the project; what cannot be read or parsed offers nothing."""

    def complete(ctx: typer.Context, incomplete: str) -> list[Offer]:
        try:
            return [(str(value), _inert(about)) for value, about in offers(_project(ctx), ctx)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # a project that is off in any way
            return []

    return complete


def _inert(words: object) -> str:
    """Shells that show a word about a value get it rendered from markup, so brackets become round ones."""
    return visible(str(words)).replace("[", "(").replace("]", ")")


def _project(ctx: typer.Context) -> _Project:
    """The project of `-C DIR`, with flags before environment before sources.toml, as everywhere."""
    given = ctx.find_root().params
    root = Path(given.get("project") or "").expanduser()
    file = root / "sources.toml"
    packaged = (_PACKAGE / "sources.toml", _PACKAGE.parent / "sources.toml")
    path = next(p for p in (file, *packaged) if p.exists())
    manifest = tomllib.loads(path.read_text(encoding="utf-8"))
    said = manifest.get("project", {})
    folders = []
    for name in ("data", "results"):
        flag = given.get(f"{name}_dir") or os.environ.get(f"GREATCTL_{name}_dir".upper())
        folders.append(Path(flag).expanduser() if flag else root / Path(said.get(f"{name}_dir", name)).expanduser())
    return _Project(root, folders[0], folders[1], manifest)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _sealed(folder: Path, pattern: str = "*") -> list[Path]:
    """Sealed folders, the newest first."""
    found = [path.parent for path in folder.glob(f"{pattern}/artifact.json")]
    return sorted(found, key=lambda path: (path / "artifact.json").stat().st_mtime, reverse=True)


def _saes(project: _Project, ctx: typer.Context) -> Iterator[Offer]:
    for folder in _sealed(project.results / "saes"):
        said = _json(folder / "run.json").get("summary", {})
        ev = said.get("explained_variance")
        yield folder.name, f"{ev:.3f} of the variance" if isinstance(ev, float) else ""


def _latents(project: _Project, ctx: typer.Context) -> list[Offer]:
    """The latents of the newest hypotheses, with their verdicts; of the asked SAE where one is named."""
    named = ctx.params.get("sae")
    for folder in _sealed(project.results / "features"):
        if named in (None, folder.name):
            rows = _json(folder / "run.json")["summary"]["hypotheses"]
            return list({str(r["latent"]): f"{r['concept']}: {r['verdict']}" for r in reversed(rows)}.items())[::-1]
    return []


def _characters(project: _Project, ctx: typer.Context) -> list[Offer]:
    return [(row["id"], row.get("name", "")) for row in project.manifest.get("character", ())]


def _sources(project: _Project, ctx: typer.Context) -> list[Offer]:
    return [offer for kind in ("seed", "source", "control") for offer in _entries(project, kind)]


def _controls(project: _Project, ctx: typer.Context) -> list[Offer]:
    return _entries(project, "control")


def _entries(project: _Project, kind: str) -> list[Offer]:
    return [(row["id"], row.get("title", "")) for row in project.manifest.get(kind, ())]


def _models(project: _Project, ctx: typer.Context) -> list[Offer]:
    """The bundled model, the manifest's, and those in the Hugging Face cache, each once."""
    cached = ((path.name[8:].replace("--", "/"), "in the cache") for path in _cache().glob("models--*"))
    named = [(project.model, "sources.toml"), *cached, ("bundled", "small, offline")]
    return list(dict(named).items())


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def _harvested(project: _Project, ctx: typer.Context) -> list[Offer]:
    return [(path.name, path.parent.name) for path in _sealed(project.data / "activations", "*/*")]


def _hook_points(project: _Project, ctx: typer.Context) -> list[Offer]:
    """Every place of the model that will be read, as far as its config is on this machine."""
    tokens = [_json(path / "artifact.json")["config"].get("model") for path in _sealed(project.data / "tokens")]
    model = ctx.params.get("model") or next(filter(None, tokens), None) or project.model
    packaged = _PACKAGE / "reference" / "model" / "config.json"
    cached = _cache().glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json")
    files = [packaged] if model == "bundled" else [Path(model) / "config.json", *cached]
    config = next((_json(path) for path in files if path.exists()), {})
    layers = range(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    return [(f"blocks.{layer}.{place}", "") for layer in layers for place in (*_PLACES, *_HEADS)]


def _pairs(project: _Project, ctx: typer.Context) -> list[Offer]:
    bundled = sorted(path.stem for path in (_PACKAGE / "reference" / "pairs").glob("*.toml"))
    own = sorted(str(path) for path in Path().glob("*.toml") if path.name != "sources.toml" and _has_pairs(path))
    return [*((name, "bundled") for name in (*bundled, "copying")), *((name, "file") for name in own)]


def _has_pairs(path: Path) -> bool:
    return bool({"pair", "template"} & tomllib.loads(path.read_text()).keys())


def _concepts(project: _Project, ctx: typer.Context) -> list[Offer]:
    bundled = sorted(path.stem for path in (_PACKAGE / "features" / "concept_files").glob("*.toml"))
    return [(name, "") for name in (*bundled, "all")]


def _registered(hook: str) -> Complete:
    """Built-in names and those that plugin files register in `hook`, read and not run."""

    def offers(project: _Project, ctx: typer.Context) -> Iterator[Offer]:
        yield from ((name, "") for name in _names_in(_PACKAGE / "extend" / "builtins.py", hook))
        if ctx.find_root().params.get("no_plugins"):
            return
        given = [Path(path) for path in ctx.find_root().params.get("plugin") or ()]
        for path in (*sorted((project.root / "plugins").glob("*")), *given):
            file = path / "__init__.py" if path.is_dir() else path
            if file.suffix == ".py" and file.is_file():
                yield from ((name, f"plugin {path.stem}") for name in _names_in(file, hook))

    return _of_project(offers)


def _names_in(file: Path, hook: str) -> list[str]:
    """First arguments of the calls in the function `hook` of a file."""
    try:
        tree = ast.parse(file.read_text())
    except (SyntaxError, ValueError, OSError):
        return []
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == hook)
    calls = (node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call) and node.args)
    first = (call.args[0] for call in calls)
    return [node.value for node in first if isinstance(node, ast.Constant) and isinstance(node.value, str)]


_BY_NAME: dict[str, Complete] = {
    "device": _words(_DEVICES),
    "sae": _of_project(_saes),
    "latent": _of_project(_latents),
    "character": _of_project(_characters),
    "control": _of_project(_controls),
    "source": _of_project(_sources),
    "model": _of_project(_models),
    "pairs": _of_project(_pairs),
    "concept": _of_project(_concepts),
    "arch": _registered("register_architectures"),
    "metric": _registered("register_metrics"),
    "target_hook_point": _of_project(_harvested),
}
_SPECIAL: dict[tuple[str, str], Complete] = {
    ("run", "start"): _words(STAGES),
    ("train", "hook_point"): _of_project(_harvested),
    ("train", "name"): _of_project(_saes),
    ("train", "sweep"): _words(_SWEPT),
    ("harvest", "hook_point"): _of_project(_hook_points),
}
