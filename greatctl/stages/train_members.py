"""The SAEs that `greatctl train --sweep KEY=A,B` stands for: every combination of the values, each as the single
command that asks for it, with a name of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import GreatctlError, InputError, ManifestError, UsageError, did_you_mean
from ..settings import Origins
from ..store.artifact import Artifact, Identity
from .context import Context
from .sae_options import option_value
from .train_jobs import Job, prepare

if TYPE_CHECKING:
    from .train import Config

__all__ = ["Member", "members_of"]

_SWEPT = (
    "arch",
    "k",
    "lr",
    "d_sae",
    "expansion",
    "hook_point",
    "target_hook_point",
    "l1_coefficient",
    "decoder_norm_weighted",
    "aux_coefficient",
    "seed",
)
_IN_NAME = ("arch", "d_sae", "expansion", "k", "hook_point")  # what a name holds that nobody chose
_BARE = ("arch", "hook_point", "target_hook_point")  # words that need no key before them in a name


@dataclass
class Member:
    """One SAE of a sweep: what it is asked for, and how far it is."""

    ctx: Context
    config: Config
    job: Job
    artifact: Artifact | None = None
    state: str = "trained"
    summary: Mapping[str, Any] = field(default_factory=dict)
    error: GreatctlError | None = None

    @property
    def final(self) -> Path:
        """Its folder, once it is sealed."""
        assert self.job.plan.final is not None
        return self.job.plan.final

    @property
    def identity(self) -> Identity:
        """What was asked for."""
        assert self.job.plan.identity is not None
        return self.job.plan.identity

    @property
    def site(self) -> str:
        """What it reads (and writes): the same for all that are trained on the same rows."""
        target = self.config.target_hook_point if self.job.inputs.target_meta else ""
        return f"{self.job.inputs.meta['hook_point']} {target}"

    @property
    def k(self) -> object:
        """Active latents a token, where the architecture has them."""
        return self.job.options.get("k")


def members_of(ctx: Context, config: Config) -> list[Member]:
    """The SAEs, in the order of their combinations: the last key changes fastest.

    Raises: as `train_jobs.prepare` for each of them, and
        UsageError: a key or a value that cannot be swept, or two combinations that are one SAE.
        InputError: the hook points were harvested from different tokens.
    """
    _refuse(ctx, config)
    known: dict[object, Any] = {}
    members = []
    for values in itertools.product(*config.sweep.values()):
        chosen = dict(zip(config.sweep, values, strict=True))
        its_ctx, its_config = _asked(ctx, config, chosen)
        job = _prepared(its_ctx, its_config, known, chosen)
        if not config.name:
            name = job.name + _suffix({k: v for k, v in chosen.items() if k not in _IN_NAME})
            its_ctx, its_config = _named(its_ctx, its_config, name)
            job = prepare(its_ctx, its_config, known)
        members.append(Member(its_ctx, its_config, job))
    _refuse_twins(members)
    _refuse_strangers(members)
    return members


def _prepared(ctx: Context, config: Config, known: dict[object, Any], chosen: Mapping[str, str]) -> Job:
    """As `prepare`; what is refused is put down to the sweep that asked for it."""
    try:
        return prepare(ctx, config, known)
    except (ManifestError, UsageError) as error:
        texts = [error.message, error.why, error.fix]
        for key in chosen:
            own = key in _SWEPT
            flag = "--" + key.replace("_", "-") if own else f"--option(?: {key})?"
            pattern = rf"(?:flag )?{flag}(?![\w-])" + ("" if own else rf"|the option {key}\b")
            texts = [re.sub(pattern, f"--sweep {key}", text) for text in texts]
        message, why, fix = texts
        raise type(error)(message, why=why, fix=fix, where=error.where, code=error.name) from None


def _refuse_strangers(members: Sequence[Member]) -> None:
    """Activations of other tokens, whose rows are not those of the others."""
    first = members[0].job.inputs.meta
    for member in members:
        meta = member.job.inputs.meta
        if meta["tokens"] != first["tokens"]:
            sites = f"{first['hook_point']} and {meta['hook_point']}"
            raise InputError(
                f"the activations of {sites} cannot be walked through together",
                why=f"they were harvested from other tokens: {first['tokens_name']} and {meta['tokens_name']}",
                fix="harvest both in one command: `greatctl harvest --hook-point A --hook-point B`",
                code="no-pair",
            )


def _refuse_twins(members: Sequence[Member]) -> None:
    seen: dict[object, str] = {}
    for member in members:
        for mark in (member.final, member.identity.fingerprint):
            if mark in seen:
                raise UsageError(
                    f"two combinations of the sweep are one SAE: {seen[mark]} and {member.final.name}",
                    why="a value stands there twice, or does not change what is trained",
                    fix="leave one of the values out",
                )
            seen[mark] = member.final.name


def _refuse(ctx: Context, config: Config) -> None:
    """Settings that do not go with a sweep."""
    names = config.sweep.get("arch", [config.arch])
    schemas = [ctx.plugins.registry.get("architectures", name).Config for name in names]
    options = {key for schema in schemas for key in schema.model_fields}
    for key in config.sweep:
        if key in type(config).model_fields and key not in _SWEPT:
            raise UsageError(
                f"--sweep cannot vary {key}",
                why="the SAEs of a sweep are trained on the same batches, in one walk",
                fix=f"sweep {', '.join(_SWEPT)} or an option of the architecture; run one command for each {key}",
            )
        if key not in _SWEPT and key not in options:
            why = f"there is no such setting, of the training or of {', '.join(names)}"
            raise UsageError(f"--sweep cannot vary {key}", why=why, fix=did_you_mean(key, options | {*_SWEPT}))
        if key in config.option:
            why, fix = "both of them set it", f"leave it out of {ctx.origins.get('option', '--option')}"
            raise UsageError(f"--option {key} and --sweep {key} exclude each other", why=why, fix=fix)
        if key != "seed" and ctx.origins.get(key, "").startswith("flag"):
            flag = "--" + key.replace("_", "-")
            why = "both of them set it"
            raise UsageError(f"{flag} and --sweep {key} exclude each other", why=why, fix="give one of them")
    if config.export:
        why = "an export is made of one finished SAE"
        raise UsageError("--export does not go with --sweep", why=why, fix="train, then --name NAME --export FORMAT")


def _asked(ctx: Context, config: Config, chosen: Mapping[str, str]) -> tuple[Context, Config]:
    """Context and settings of the single command that asks for one combination."""
    values = {**config.model_dump(exclude={"sweep"}), "option": dict(config.option)}
    origins = {name: origin for name, origin in ctx.origins.items() if name != "sweep"}
    for key, text in chosen.items():
        own = key in _SWEPT
        (values if own else values["option"])[key] = text if own else option_value(text)
        name = key if own else "option"
        origins[name] = "flag --" + name.replace("_", "-")
    if "seed" in chosen and config.shuffle_seed is None and _whole(chosen["seed"]) != config.seed:
        values["shuffle_seed"], origins["shuffle_seed"] = config.seed, "flag --shuffle-seed"
    if config.name:
        values["name"], origins["name"] = config.name + _suffix(chosen), "flag --name"
    try:
        made = type(config).model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = str(problem["loc"][0]) if problem["loc"] else "sweep"
        what = f"--sweep {key}={chosen.get(key, '')}"
        raise UsageError(f"{what} is not possible", why=problem["msg"], fix=f"change --sweep {key}") from None
    return _with_origins(ctx, made, origins), made


def _named(ctx: Context, config: Config, name: str) -> tuple[Context, Config]:
    made = config.model_copy(update={"name": name})
    return _with_origins(ctx, made, {**ctx.origins, "name": "flag --name"}), made


def _with_origins(ctx: Context, config: Config, origins: Mapping[str, str]) -> Context:
    """With the member's settings as the flags that would give them, so that `status` can ask for it again."""
    found = Origins(origins, config.model_dump(mode="json"))
    if ctx.origins.get("sweep", "default").split()[0] in ("sources.toml", "env"):
        found.given["sweep"] = {}
    return dataclasses.replace(ctx, origins=found)


def _suffix(chosen: Mapping[str, str]) -> str:
    words = [value if key in _BARE else f"{key}{value}" for key, value in chosen.items()]
    return "".join("-" + re.sub(r"[^A-Za-z0-9._-]+", "_", word) for word in words)


def _whole(text: str) -> int | None:
    """A whole number, or None where the text is none (the schema then says so)."""
    return int(text) if text.strip().isdigit() else None
