"""From the name that a person gives to an SAE to what it is, and to the activations that it reads.

A name below results/saes, a folder from elsewhere in SAELens layout, or nothing for the newest. A folder from elsewhere may
hold anything, so what it says is checked before anything relies on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, did_you_mean
from ..store.artifact import Artifact, load, sealed_under
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
        InputError: there is none, or the folder is none.
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
    elif not (path / _CFG).is_file() or not (path / _WEIGHTS).is_file():
        raise InputError(
            f"there is no SAE {name!r}",
            why=f"neither a name under {ctx.project.saes} nor a folder with {_CFG} and {_WEIGHTS}",
            fix=did_you_mean(str(name), sealed),
        )
    return _facts_of(path, artifact)


def _facts_of(path: Path, artifact: Artifact | None) -> Sae:
    """What cfg.json and training.json say.

    Raises:
        InputError: they are not as an SAE's are; a folder from elsewhere may hold anything.
    """
    cfg = _object(path / _CFG)
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
            f"{path / _CFG} is not that of an SAE",
            why=f"{', '.join(odd)}: missing, or of another type than expected",
            fix="name a folder in SAELens layout, or a trained SAE (`greatctl status` lists them)",
            where=str(path / _CFG),
        )
    key = artifact.fingerprint if artifact else sha256_file(path / _CFG) + sha256_file(path / _WEIGHTS)
    architecture = str(cfg.get("architecture"))
    return Sae(path, key, cfg["d_sae"], cfg["d_in"], **words, architecture=architecture, sealed=artifact)


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
