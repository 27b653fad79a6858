"""From the name that a person gives to an SAE to what it is, and to the activations that it reads.

A name below results/saes, a folder from elsewhere in any layout that `greatctl.sae.foreign` reads, or nothing for the newest.
A folder from elsewhere may hold anything, so what it says is checked before anything relies on it; and it may leave out
its model, which is then that of the project's newest activations or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, did_you_mean
from ..store.artifact import Artifact, load, newest, sealed_under
from ..store.files import sha256_file
from .context import Context

if TYPE_CHECKING:
    from ..sae.folder import LoadedSAE

__all__ = ["Sae", "find_activations", "find_sae", "open_sae", "plugins_of"]

_CFG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"


@dataclass(frozen=True)
class Sae:
    """An SAE that was asked for.

    Attributes:
        key: pins its bytes.
        model: that it was trained on; where the folder does not say and no `model` setting does, the one of the newest
            activations of its width, else of the newest tokens.
        revision: of the model that it was trained on, None where the folder does not say.
        architecture: of the file, which may be a plugin's.
        sealed: None for a folder from elsewhere.
    """

    path: Path
    key: str
    d_sae: int
    d_in: int
    hook_point: str | None
    model: str | None
    revision: str | None
    architecture: str
    sealed: Artifact | None


def find_sae(ctx: Context, name: str | None) -> Sae:
    """The SAE of a name or folder, or the newest.

    Raises:
        InputError: there is none, or the folder is none, or holds several.
        IntegrityError: its config is damaged.
    """
    sealed = {a.path.name: a for a in sealed_under(ctx.project.saes, "train")}
    if name is None:
        if not sealed:
            raise InputError(
                "there is no sparse autoencoder yet",
                why=f"{ctx.project.saes} holds no finished one",
                fix="run `greatctl train` first",
            )
        artifact: Artifact | None = list(sealed.values())[-1]
    else:
        artifact = sealed.get(name)
    path = artifact.path if artifact else Path(str(name)).expanduser().absolute()
    if artifact is None and (path / "artifact.json").exists():
        artifact = load(path)
    if artifact is not None:
        artifact.check()
    elif not path.is_dir():
        raise InputError(
            f"there is no SAE {name!r}",
            why=f"neither a name under {ctx.project.saes} nor a folder",
            fix=did_you_mean(str(name), sealed),
        )
    return _facts_of(ctx, path, artifact)


def _facts_of(ctx: Context, path: Path, artifact: Artifact | None) -> Sae:
    """What the config and training.json say.

    Raises:
        InputError: they are not as an SAE's are; a folder from elsewhere may hold anything.
    """
    cfg, files = _described(path)
    metadata = cfg.get("metadata")
    said = metadata if isinstance(metadata, dict) else {}
    training = _object(path / "training.json") if (path / "training.json").is_file() else {}
    words = {
        "hook_point": training.get("hook_point") or said.get("hook_name"),
        "model": training.get("model") or said.get("model_name"),
        "revision": training.get("model_revision"),
    }
    odd = [name for name in ("d_sae", "d_in") if type(cfg.get(name)) is not int or cfg[name] < 1]
    odd += [name for name, value in words.items() if not isinstance(value, str | None)]
    if odd:
        raise InputError(
            f"{path / files[0]} is not that of an SAE",
            why=f"{', '.join(odd)}: missing, or of another type than expected",
            fix="name another folder, or a trained SAE (`greatctl status` lists them)",
            where=str(path / files[0]),
        )
    words["model"] = words["model"] or _usual_model(ctx, path.name, cfg["d_in"])
    key = artifact.fingerprint if artifact else "".join(sha256_file(path / name) for name in files)
    architecture = str(cfg.get("architecture"))
    return Sae(path, key, cfg["d_sae"], cfg["d_in"], **words, architecture=architecture, sealed=artifact)


def _described(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """cfg.json's words and the files of the folder; other programs' layouts are read where they are met."""
    if (path / _CFG).is_file() and (path / _WEIGHTS).is_file():
        return _object(path / _CFG), (_CFG, _WEIGHTS)
    from ..sae.folder import describe

    return describe(path)


def _usual_model(ctx: Context, name: str, d_in: int) -> str | None:
    """The model that an SAE is read with whose folder names none, said aloud; None where the settings name one."""
    if ctx.origins.get("model", "default") != "default":
        return None
    metas = [_object(a.path / "meta.json") for a in sealed_under(ctx.project.activations, "harvest")]
    fitting = [meta for meta in metas if meta["d_model"] == d_in]
    tokens = newest(ctx.project.tokens, "tokenize")
    if fitting:
        model, whose = str(fitting[-1]["model"]), "activations"
    elif tokens:
        model, whose = str(_object(tokens.path / "tokenizer.json")["path_or_id"]), "tokens"
    else:
        return None
    ctx.run.notice(f"{ctx.run.stage}: {name} does not name its model; taken for {model}, that of the newest {whose}")
    return model


def find_activations(ctx: Context, sae: Sae) -> Artifact:
    """The activations that the SAE was trained on, or the newest ones of its hook point and width."""
    found = sealed_under(ctx.project.activations, "harvest")
    wanted = dict(sae.sealed.record["inputs"]).get("activations") if sae.sealed else None  # type: ignore[call-overload]
    same = [a for a in found if a.fingerprint == wanted]
    fitting = [
        a
        for a in found
        if sae.hook_point in (None, a.path.name)
        and (meta := _object(a.path / "meta.json"))["d_model"] == sae.d_in
        and sae.revision in (None, meta["model_revision"])
    ]
    if not same and not fitting:
        raise InputError(
            f"there are no activations that {sae.path.name} can read",
            why=f"it reads {sae.d_in} numbers at {sae.hook_point or 'a hook point that it does not name'}"
            + (f" of {sae.model or 'a model'}, revision {sae.revision[:12]}" if sae.revision else ""),
            fix=f"run `greatctl harvest --hook-point {sae.hook_point}` first"
            if sae.hook_point
            else "run `greatctl harvest` first",
        )
    if not same and sae.sealed:
        ctx.run.notice(f"interpret: {sae.path.name} was trained on other activations than these")
    return (same or fitting)[-1].check()


def plugins_of(ctx: Context, sae: Sae) -> dict[str, str]:
    """The digest of the plugin that reads the SAE, where its architecture is a plugin's."""
    if not ctx.plugins or sae.architecture not in ctx.plugins.registry.names("architectures"):
        return {}
    return ctx.plugins.digests({"architectures": [sae.architecture]})


def open_sae(ctx: Context, sae: Sae, device: str) -> LoadedSAE:
    """The SAE itself, on a device. Errors as `greatctl.sae.folder.load`."""
    from ..sae.folder import load as load_sae

    return load_sae(sae.path, ctx.plugins.registry if ctx.plugins else None, device=device)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", why=str(error), fix="train the SAE again") from error
    return value
