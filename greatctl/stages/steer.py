"""`steer`: what the model writes with a latent turned up, and beside it what would pass for that.

    greatctl steer --latent 118 --strength 2 --prompt "The captain looked at his men and"
    greatctl steer --latent 118 --clamp 0

Each prompt is continued as it is, with the latent, and with what the latent must be held against: the difference
in means between characters and controls, a random direction, both going the same distance, and plain words put
before the prompt (`steered` does that work). It makes no artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..errors import InputError, UsageError
from ..store.artifact import Artifact, load
from ..store.tables import read_columns
from .context import Context, Plan, Result, StageConfig
from .latents import OneLatent, check_latent
from .models import chosen_model, open_recorded, pick_device
from .saes import Sae, find_sae, open_sae

if TYPE_CHECKING:
    from torch import Tensor

    from ..sae.folder import LoadedSAE
    from .branches import Branch
    from .steered import Way

__all__ = ["PROMPTS", "Config", "plan", "run"]

STAGE = "steer"
PROMPTS = ("The captain looked at his men and", "In the morning he went to work, and", "He was a man who")
PLAIN = "He was a great man, calm in danger, bold in his plans and admired by all.\n\n"
_MOST = 1e6  # farther than any model bears; squares of it are still numbers
_AGAINST = ("diff-means", "random", "prompt")


class Config(StageConfig):
    """Settings of `greatctl steer`."""

    latent: OneLatent = Field(None, description="the latent to turn")
    strength: float = Field(
        2.0,
        ge=-_MOST,
        le=_MOST,
        allow_inf_nan=False,
        description="how far, in multiples of the latent's largest activation (below 0: away)",
    )
    clamp: float | None = Field(
        None,
        ge=0,
        le=_MOST,
        allow_inf_nan=False,
        description="instead: hold the latent at this activation (0 ablates it)",
    )
    prompt: list[str] = Field([], description="text to continue (repeatable; three of its own)")
    tokens: int = Field(40, ge=1, description="tokens to write")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: always the likeliest token")
    against: list[Literal["diff-means", "random", "prompt", "none"]] = Field(
        list(_AGAINST), description="what to print beside it (repeatable); none: the latent alone"
    )
    plain: str = Field(PLAIN, min_length=1, description="the words that the plain prompt puts before the text")
    sae: str | None = Field(None, description="name under results/saes, or a folder (the newest)")
    model: str | None = Field(None, description="model to steer (default: the one that the SAE was trained on)")
    seed: int = Field(0, ge=0, description="seed of the random direction and of the draws")


@dataclass(frozen=True)
class _Job:
    """What `plan` found out. `revision` is None where another model than the SAE's was named."""

    sae: Sae
    model: str
    revision: str | None
    latent: int
    prompts: Sequence[str]
    against: Sequence[str]
    plan: Plan


def plan(ctx: Context, config: Config) -> Plan:
    """What would be steered.

    Raises:
        UsageError: no latent, an empty prompt, or settings that exclude each other.
        InputError: there is no SAE, or it does not say what it reads.
        ManifestError: there is no such latent.
    """
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Write all texts and measure each way.

    Raises: as `plan`, and
        InputError: the latent never fires, or the SAE does not fit the model.
        UsageError: a prompt is too long.
    """
    from ..model.tokenizer import encode
    from .branches import Branch, fitting, held_out_windows, unrelated_windows
    from .means import means_apart, rows_and_texts
    from .steered import Steered

    job = _prepare(ctx, config)
    model = open_recorded(ctx, job.model, job.revision, what="the SAE's activations")
    sae = open_sae(ctx, job.sae, pick_device(ctx.device))
    hook_point = fitting(model, sae)
    steered = Steered(model, hook_point, encode(model.tokenizer, config.plain)[1:] if "prompt" in job.against else [])
    ids = [steered.read(prompt, config.tokens) for prompt in job.prompts]
    known = rows_and_texts(ctx, job.sae)
    windows = held_out_windows(known[1], n_ctx=model.n_ctx) if known else None
    neutral = Branch(model, hook_point, unrelated_windows(model) if windows is None else windows)
    means = means_apart(ctx, *known) if known and "diff-means" in job.against else None
    peak, where = _peak(ctx, job, sae, neutral)
    ways = _ways(config, job, sae, peak, means, neutral)
    missing = [name for name in job.against if name not in [way.kind for way in ways]]
    if missing:
        ctx.run.notice("steer: no difference in means, because there are no harvested rows of both roles")
    price = steered.price(ways, neutral)
    written, counted = [], _counted(ctx, len(ids) * len(ways) * config.tokens)
    for prompt, row in zip(job.prompts, ids, strict=True):
        texts = steered.texts(row, ways, config.tokens, config.temperature, config.seed, counted)
        for text in texts:
            text["perplexity"] = price[str(text["kind"])]
        written.append({"prompt": prompt, "texts": texts})
    adds = config.clamp is None
    summary = {
        "prompt": job.prompts[0],
        "strength": config.strength if adds else config.clamp,
        "unit": f"the latent's largest activation, {peak:.3g} {where}" if adds else "activation",
        "form": "add" if adds else "clamp" if config.clamp else "ablate",
        "latent": job.latent,
        "texts": written[0]["texts"],
        "sae": job.sae.path.name,
        "hook_point": hook_point,
        "model": model.name,
        "residual_norm": neutral.norm,
        "neutral_tokens": int(neutral.where.sum()),
        "missing": missing,
        "prompts": written,
    }
    return Result(STAGE, None, summary)


def _counted(ctx: Context, most: int) -> Callable[[], None]:
    """What is called before each token: says how far it is, and stops where a stop was asked for."""
    done = 0

    def step() -> None:
        nonlocal done
        ctx.run.stop_here()
        done += 1
        ctx.run.progress(STAGE, done, most, "tokens")

    return step


def _prepare(ctx: Context, config: Config) -> _Job:
    if config.latent is None:
        fix = "give --latent with a number; `greatctl interpret` lists candidates"
        raise UsageError("no latent was named", why="--latent is missing", fix=fix)
    if config.clamp is not None and ctx.origins.get("strength", "default") != "default":
        why = "one holds the latent at a value, the other adds to it"
        raise UsageError("--clamp and --strength exclude each other", why=why, fix="drop one")
    against = [name for name in dict.fromkeys(config.against) if name != "none"]
    if "none" in config.against and against:
        raise UsageError("--against none excludes the others", why="it leaves the latent alone", fix="drop one")
    if any(not prompt.strip() for prompt in config.prompt):
        raise UsageError("a prompt is empty", why="there is nothing to continue", fix='give --prompt "some words"')
    sae = find_sae(ctx, config.sae)
    check_latent(sae, config.latent)
    if sae.hook_point is None or (sae.model is None and config.model is None):
        raise InputError(
            f"{sae.path.name} does not say which model and hook point it reads",
            why="cfg.json has no model_name or hook_name",
            fix="add them under `metadata` in its cfg.json; --model names the model",
        )
    model = chosen_model(ctx, config.model, fallback=sae.model)[1]
    prompts = tuple(config.prompt) or PROMPTS
    facts = {
        "sae": sae.path.name,
        "latent": config.latent,
        "hook_point": sae.hook_point,
        "model": model,
        "prompts": len(prompts),
        "against": against,
    }
    revision = sae.revision if config.model is None else None
    return _Job(sae, model, revision, config.latent, prompts, against, Plan(STAGE, None, None, facts))


def _peak(ctx: Context, job: _Job, sae: LoadedSAE, neutral: Branch) -> tuple[float, str]:
    """The latent's largest activation and where it was seen: the tables of exactly this SAE, or else the neutral text."""
    tables = _tables(ctx, job.sae)
    if tables is not None:
        column = read_columns(tables.path / "latents.parquet", ["latent", "max"])
        return float(column["max"][column["latent"].index(job.latent)]), "in the feature tables"
    peak = max(float(acts[:, job.latent].max()) for acts in neutral.acts(sae))
    return peak, f"in {int(neutral.where.sum()):,} tokens (no feature tables yet)"


def _tables(ctx: Context, sae: Sae) -> Artifact | None:
    folder = ctx.project.features / sae.path.name
    artifact = load(folder) if (folder / "artifact.json").is_file() else None
    if artifact is None or dict(artifact.record["inputs"]).get("sae") != sae.key:  # type: ignore[call-overload]
        return None
    return None if artifact.damaged() else artifact


def _ways(config: Config, job: _Job, sae: LoadedSAE, peak: float, means: Tensor | None, neutral: Branch) -> list[Way]:
    """The text as it is, the latent, and what it is held against.

    Raises:
        InputError: the latent was never seen to fire, so that a multiple of its activation is none.
    """
    from ..features.steering import Steering, random_directions, rows_of, to_value, unit
    from .steered import Way

    row = rows_of(sae, [job.latent])[0].to(neutral.value.device)
    if config.clamp is not None:
        amount = to_value(sae, job.latent, config.clamp)
    elif config.strength and not peak:
        raise InputError(
            f"latent {job.latent} never fired in what was read",
            why="--strength counts in multiples of its largest activation",
            fix="name another --latent, or hold it at an activation with --clamp",
            code="never-fires",
        )
    else:
        amount = config.strength * peak * float(row.norm())
    directions = {
        "latent": row,
        "diff-means": None if means is None else means.float().to(row.device),
        "random": random_directions(1, len(row), config.seed)[0].to(row.device),
    }
    ways = [Way("none")]
    for name in ("latent", *job.against):
        direction = directions.get(name)
        if name == "prompt":
            ways.append(Way(name, plain=True))
        elif direction is not None:
            steering = Steering(unit(direction), amount)
            ways.append(Way(name, steering, steering.mean(neutral.value[neutral.where]) / neutral.norm))
    return ways
