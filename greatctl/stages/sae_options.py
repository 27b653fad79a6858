"""From what a person asked of an autoencoder to its architecture's settings, checked against the architecture's schema.

Each architecture, a plugin's too, declares its own settings. The common ones have flags; the rest are set with
`--option KEY=VALUE` or a table `option = {…}` in sources.toml. A value takes the type that the schema says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from ..errors import GreatctlError, ManifestError, UsageError, did_you_mean
from .context import Context, StageConfig

__all__ = ["ARCH_FLAGS", "architecture_options", "one_of", "option_value", "pairs", "sweeps"]

ARCH_FLAGS = ("k", "l1_coefficient", "decoder_norm_weighted", "aux_coefficient")
_GIVEN_ELSEWHERE = {
    "d_in": "it follows from the activations",
    "d_out": "it follows from --target-hook-point",
    "d_sae": "it has the flags --d-sae and --expansion",
}
_WIDE = 1024  # from this d_model on, 64 active latents instead of 32
_COEFFICIENTS = ("l1_coefficient", "l0_coefficient")  # given, they say how sparse, so that k has no default
_VALUES = re.compile(r"[^,\[]*\[[^\]]*\][^,]*|[^,]+")  # between commas that stand in no brackets
_RANK = {"flag": 3, "env": 2, "sources.toml": 1}


def pairs(value: object) -> object:
    """KEY=VALUE words (a list, or one text with commas between them) as a dictionary; a table stays as it is."""
    if not isinstance(value, str | list | tuple):
        return value
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else [str(word) for word in value]
    found: dict[str, object] = {}
    for word in filter(None, words):
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise PydanticCustomError("option_form", "{word} is not of the form KEY=VALUE", {"word": word})
        found[key.strip().replace("-", "_")] = option_value(text.strip())
    return found


def sweeps(value: object) -> object:
    """KEY=A,B words (a list, or one text with `;` between them) as key -> values; a value in brackets may hold commas."""
    if not isinstance(value, str | list | tuple):
        return value
    words = value.split(";") if isinstance(value, str) else [str(word) for word in value]
    found: dict[str, list[str]] = {}
    for word in filter(None, (word.strip() for word in words)):
        key, equals, text = word.partition("=")
        values = [one.strip() for one in _VALUES.findall(text) if one.strip()]
        if not equals or not key.strip() or not values:
            raise PydanticCustomError("sweep_form", "{word} is not of the form KEY=A,B", {"word": word})
        found.setdefault(key.strip().replace("-", "_"), []).extend(values)
    return found


def one_of(ctx: Context, config: StageConfig, names: Sequence[str], default: tuple[str, int]) -> tuple[str, int]:
    """The one setting of `names` that counts: of the nearest origin (flag > environment > sources.toml).

    Raises:
        UsageError: two of them come from the same place.
    """
    given = [(name, getattr(config, name)) for name in names if getattr(config, name) is not None]
    ranks = [_RANK.get(ctx.origins.get(name, "default").split()[0], 0) for name, _ in given]
    nearest = [pair for pair, rank in zip(given, ranks, strict=True) if rank == max(ranks)]
    if len(nearest) > 1:
        flags = " and ".join(_flag(name) for name, _ in nearest)
        raise UsageError(f"{flags} exclude each other", why="each of them sets the same thing", fix="give one of them")
    return nearest[0] if nearest else default


def architecture_options(
    ctx: Context,
    arch: str,
    schema: type[BaseModel],
    flags: Mapping[str, object],
    extra: Mapping[str, object],
    sizes: Mapping[str, int],
) -> dict[str, object]:
    """An architecture's settings, defaults filled in.

    Args:
        schema: the architecture's Config.
        flags: the settings of `ARCH_FLAGS`, None where not given.
        extra: `--option`.
        sizes: d_in, d_sae and, where a target is written, d_out.

    Raises:
        UsageError: a flag or an option that the architecture does not have, or a value of another type.
        ManifestError: a value out of range.
    """
    known = set(schema.model_fields)
    own = known - set(_GIVEN_ELSEWHERE)
    for name in sorted(set(ARCH_FLAGS) - known):
        if flags[name] is not None and ctx.origins.get(name, "").startswith("flag"):
            raise UsageError(
                f"{arch} has no {_flag(name)}",
                why=f"its settings are {', '.join(sorted(own)) or 'none'}",
                fix=f"leave {_flag(name)} out, or choose another --arch",
            )
    _check_names(ctx, arch, own, flags, extra)
    values = {name: flags[name] for name in ARCH_FLAGS if name in known and flags[name] is not None} | dict(extra)
    if "k" in known and "k" not in values and not any(name in values for name in _COEFFICIENTS):
        values["k"] = 64 if sizes["d_in"] >= _WIDE else 32
    try:
        checked = schema(**{name: size for name, size in sizes.items() if name in known}, **values)
    except ValidationError as error:
        raise _refused(ctx, arch, known, extra, error) from None
    return checked.model_dump(mode="json")


def _check_names(
    ctx: Context, arch: str, own: set[str], flags: Mapping[str, object], extra: Mapping[str, object]
) -> None:
    for name in extra:
        if name in _GIVEN_ELSEWHERE:
            raise UsageError(f"--option cannot set {name}", why=_GIVEN_ELSEWHERE[name], fix="leave the option out")
        if name not in own:
            fix = did_you_mean(name, own)
            raise UsageError(f"{arch} has no setting {name!r}", why=f"given by: {_origin(ctx)}", fix=fix)
        if flags.get(name) is not None:
            raise UsageError(f"{_flag(name)} and --option {name} exclude each other", fix=f"give {_flag(name)} alone")


def _refused(
    ctx: Context, arch: str, known: set[str], extra: Mapping[str, object], error: ValidationError
) -> GreatctlError:
    first = error.errors(include_url=False)[0]
    what = str(first["loc"][0]) if first["loc"] else "k" if "k" in known else "settings"
    message = f"{arch}: {first['msg'].removeprefix('Value error, ')}"
    if what not in extra:
        fix = "change --k, --d-sae or --expansion" if what == "k" else f"change {_flag(what)}"
        why = f"{what} comes from: {ctx.origins.get(what, 'default')}"
        return ManifestError(message, why=why, fix=fix, code="out-of-range")
    why, fix = f"{what} = {extra[what]!r} comes from: {_origin(ctx)}", f"change the option {what}"
    if first["type"].endswith(("_parsing", "_type")):
        return UsageError(message, why=why, fix=fix)
    return ManifestError(message, why=why, fix=fix, code="out-of-range")


def _origin(ctx: Context) -> str:
    return ctx.origins.get("option", "--option")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option_value(text: str) -> object:
    """A list, a table or null is read as JSON; anything else stays a text, which the schema turns into its type."""
    if text.startswith(("[", "{")) or text == "null":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text
