"""The causal half of the evidence: latents changed in the running model, on prompt pairs that nobody looked at.

Joins the rooms: pairs come from `patching`, runs from `model`, latents from the SAE, and what is tried and what it
weighs from `features.causal`. Every trial goes on from the stored activation at the SAE's hook point, many at once;
a prompt that a trial does not touch (the latent is silent there) is not run at all, since its effect is 0 exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import StageError
from ..features.causal import Outcomes, Readings, Trial, equal_firing, trials_of, weigh
from ..features.steering import SparseCode, moved, random_directions, rows_of
from ..model.interface import FrozenModel
from ..model.tokenizer import encode, pad_id
from ..patching.answers import answers_of
from ..patching.metrics import LogitDiff
from ..patching.pair_files import Pair, read_pairs
from ..patching.pairs import EncodedPair, clusters_of, encode_pairs
from .branches import Branch, Price, fitting, unrelated_windows
from .context import Context

if TYPE_CHECKING:
    import pyarrow as pa

    from ..sae.folder import LoadedSAE

__all__ = ["causal_evidence"]

N_RANDOM, N_OTHERS = 24, 20
_TOKENS = 4096  # tokens that run at once


def causal_evidence(
    ctx: Context,
    model: FrozenModel,
    sae: LoadedSAE,
    latents: Sequence[int],
    pairs: str | Path | Sequence[Pair],
    *,
    held_out_only: bool = True,
    windows: Tensor | None = None,
    density: Tensor | None = None,
    peaks: Mapping[int, float] | None = None,
    baselines: Mapping[str, Tensor] | None = None,
    n_random: int = N_RANDOM,
    seed: int = 0,
) -> tuple[dict[int, dict[str, float]], pa.Table]:
    """What changing each latent does to the concept's logit differences.

    Args:
        latents: those to weigh.
        pairs: the concept's pairs: a bundled set's name, a pair file, or pairs.
        held_out_only: only pairs that are marked as held out.
        windows: unrelated text, ids [w, q] without padding, for the damage, the mean norm and (where they are not
            given) densities and peaks; default: a little that comes with greatctl.
        density: share of tokens on which each latent fires [d_sae].
        peaks: latent -> the activation that it is clamped to.
        baselines: name -> direction [d] that is steered along for comparison (the difference in means).
        seed: of the random directions and the resampling.

    Returns:
        (latent -> numbers, see `greatctl.features.causal.weigh`; nothing where no pair can be used), and
        causal.parquet: a row a trial and pair: latent (-1: none), kind, strength, draw, pair, effect (logits; of
        `complement`, what is kept of the pair's own difference, which is the row of kind `gap`), damage_kl, damage_ce.

    Raises:
        InputError: the SAE does not read and write one site of this model.
        StageError: its decoder is not affine, or nothing that was changed reached the logits.
        UsageError, ManifestError: the pairs cannot be read.
    """
    hook_point, latents = fitting(model, sae), list(dict.fromkeys(latents))
    encoded = _usable(ctx, model, pairs, held_out_only) if latents else []
    if not encoded:
        return {}, _table([], None, [])
    prompts = Branch(model, hook_point, *_prompts(model, encoded))
    neutral = Branch(model, hook_point, unrelated_windows(model) if windows is None else windows)
    random = random_directions(n_random, prompts.value.shape[-1], seed)
    trials = _trials(sae, prompts, neutral, encoded, latents, density, peaks or {}, random, baselines or {})
    effects, gap = _effects(ctx, prompts, encoded, trials)
    _must_move(trials, effects, hook_point)
    kl, ce = _damage(ctx, neutral, trials)
    outcomes = Outcomes(effects, kl, ce, clusters_of([pair.pair for pair in encoded]), gap)
    return weigh(trials, outcomes, latents, seed), _table(trials, outcomes, encoded)


def _trials(
    sae: SparseCode,
    prompts: Branch,
    neutral: Branch,
    pairs: Sequence[EncodedPair],
    latents: Sequence[int],
    density: Tensor | None,
    peaks: Mapping[int, float],
    random: Tensor,
    baselines: Mapping[str, Tensor],
) -> list[Trial]:
    """All trials, with the placebo latents chosen and what was not given measured on these texts."""
    device = prompts.value.device
    seen, highest = _firing(sae, (prompts, neutral))
    others = equal_firing(seen if density is None else density.cpu(), latents, N_OTHERS)
    read = _read(prompts, sae, [*latents, *others])
    return trials_of(
        read,
        _read(neutral, sae, [*latents, *others]),
        rows_of(sae, [*latents, *others]).to(device),
        latents,
        others,
        apart=_apart(read, pairs, len(latents)),
        norm=neutral.norm,
        peaks=[float(peaks.get(latent, highest[latent])) for latent in latents],
        random=random.to(device),
        baselines={name: direction.to(device) for name, direction in baselines.items()},
    )


def _usable(
    ctx: Context, model: FrozenModel, pairs: str | Path | Sequence[Pair], held_out_only: bool
) -> list[EncodedPair]:
    """The pairs that can be tried, said aloud where some or all cannot."""
    if isinstance(pairs, str | Path):
        path = Path(pairs).expanduser()
        if not path.suffix and len(path.parts) == 1:
            from ..reference import pairs_path

            path = Path(pairs_path(str(pairs)))
        pairs = read_pairs(path)
    chosen = [pair for pair in pairs if pair.heldout or not held_out_only]
    encoded, refused = encode_pairs(chosen, lambda text: encode(model.tokenizer, text), n_ctx=model.n_ctx, plain=False)
    single = [e for e in encoded if max(map(len, (*e.answers, *e.wrong_answers))) == 1]
    lost = len(refused) + len(encoded) - len(single)
    if not chosen:
        ctx.run.notice(f"{ctx.run.stage}: no causal evidence, because none of {len(pairs)} pairs is held out")
    elif lost:
        words = "pairs cannot be tried under this tokenizer (unequal prompts, or answers of several tokens)"
        ctx.run.notice(f"{ctx.run.stage}: {lost} of {len(chosen)} held-out {words}")
    return single


def _prompts(model: FrozenModel, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    """Tokens and real places, [2 n, p] each: the clean prompts and then the corrupted ones."""
    ids = [pair.clean_ids for pair in pairs] + [pair.corrupted_ids for pair in pairs]
    width, pad = max(map(len, ids)), pad_id(model.tokenizer)
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids])
    return tokens, torch.tensor([[i < len(row) for i in range(width)] for row in ids])


def _firing(sae: SparseCode, texts: Sequence[Branch]) -> tuple[Tensor, Tensor]:
    """Density [d_sae] and highest activation [d_sae] over these texts, on the CPU."""
    fired, highest, n = torch.zeros(len(sae.W_dec)), torch.zeros(len(sae.W_dec)), 0
    for text in texts:
        for acts in text.acts(sae):
            fired += (acts > 0).sum(dim=0).cpu()
            highest = torch.maximum(highest, acts.amax(dim=0).float().cpu())
        n += int(text.where.sum())
    return fired / max(n, 1), highest


def _read(text: Branch, sae: SparseCode, latents: Sequence[int]) -> Readings:
    return Readings(torch.stack([acts[:, list(latents)].float() for acts in text.acts(sae)]), text.where)


def _apart(prompts: Readings, pairs: Sequence[EncodedPair], count: int) -> Tensor:
    """What the first `count` latents have at the clean prompt's place more than at the corrupted one's, [2 n, p, count].

    It stands at the places of the corrupted prompts; those without a counterpart, and special tokens, have none.
    """
    acts, apart = prompts.acts[..., :count], torch.zeros_like(prompts.acts[..., :count])
    for clean, pair in enumerate(pairs):
        corrupted = len(pairs) + clean
        i, j = torch.tensor(pair.alignment, device=acts.device).T
        both = prompts.where[clean, i] & prompts.where[corrupted, j]
        apart[corrupted, j] = (acts[clean, i] - acts[corrupted, j]) * both[:, None]
    return apart


@torch.no_grad()
def _effects(
    ctx: Context, prompts: Branch, pairs: Sequence[EncodedPair], trials: Sequence[Trial]
) -> tuple[np.ndarray, np.ndarray]:
    """What presence adds to the logit difference [n_trials, n], and the pairs' own difference [n]; both float64."""
    n, device = len(pairs), prompts.value.device
    ids = [pair.clean_ids for pair in pairs] + [pair.corrupted_ids for pair in pairs]
    ends = torch.tensor([len(row) - 1 for row in ids], device=device)
    everyone = torch.arange(2 * n, device=device)
    untouched = prompts.logits(everyone, prompts.value, ends).float()
    answers, metric = answers_of([*pairs, *pairs], untouched, untouched), LogitDiff()
    before = metric(untouched, answers).double()
    effects = torch.zeros(len(trials), 2 * n, dtype=torch.float64)
    amounts = torch.stack([trial.pairs for trial in trials])
    which, row = amounts.any(dim=-1).nonzero(as_tuple=True)
    together = max(1, _TOKENS // prompts.tokens.shape[1])
    for t, r in zip(which.split(together), row.split(together), strict=True):
        ways = torch.stack([trials[i].direction for i in t.tolist()])
        changed = moved(prompts.value[r], amounts[t, r], ways[:, None])
        after = metric(prompts.logits(r, changed, ends[r]).float(), answers.rows(r)).double()
        effects[t.cpu(), r.cpu()] = (after - before[r]).cpu()
        ctx.run.stop_here()
    weight = torch.tensor([trial.sign / trial.prompts for trial in trials], dtype=torch.float64)
    return (weight[:, None] * (effects[:, :n] + effects[:, n:])).numpy(), (before[:n] - before[n:]).cpu().numpy()


@torch.no_grad()
def _damage(ctx: Context, neutral: Branch, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
    """KL and rise of the cross-entropy of each trial, nats a token, float64 [n_trials]; NaN where not measured."""
    price = Price(neutral)
    priced = [i for i, trial in enumerate(trials) if trial.windows is not None]
    amounts = torch.stack([trials[i].windows for i in priced])  # type: ignore[arg-type]
    found = torch.zeros(2, len(priced), amounts.shape[1], dtype=torch.float64)
    which, row = amounts.any(dim=-1).nonzero(as_tuple=True)
    together = min(price.together, max(1, _TOKENS // neutral.tokens.shape[1]))
    for t, r in zip(which.split(together), row.split(together), strict=True):
        ways = torch.stack([trials[priced[i]].direction for i in t.tolist()])
        kl, ce = price.of(r, moved(neutral.value[r], amounts[t, r], ways[:, None]))
        found[:, t.cpu(), r.cpu()] = torch.stack([kl, ce])
        ctx.run.stop_here()
    damage = np.full((2, len(trials)), np.nan)
    damage[:, priced] = found.mean(dim=-1).numpy()
    return damage[0], damage[1]


def _must_move(trials: Sequence[Trial], effects: np.ndarray, hook_point: str) -> None:
    """A push of a mean norm in any direction reaches the logits, unless nothing was pushed.

    Raises:
        StageError: it did not; `code` is `self-check`.
    """
    pushed = [i for i, trial in enumerate(trials) if trial.kind == "random"]
    if pushed and not effects[pushed].any():
        raise StageError(
            f"the self-check at {hook_point} failed",
            why=f"{len(pushed)} pushes along random directions moved no logit",
            fix="use another hook point; `greatctl doctor` checks the installation",
            code="self-check",
        )


def _table(trials: Sequence[Trial], outcomes: Outcomes | None, pairs: Sequence[EncodedPair]) -> pa.Table:
    """causal.parquet."""
    import pyarrow as pa

    n = len(pairs)
    schema = pa.schema(
        [("latent", pa.int32()), ("kind", pa.string()), ("strength", pa.float64()), ("draw", pa.int32()),
         ("pair", pa.string()), ("effect", pa.float64()), ("damage_kl", pa.float64()), ("damage_ce", pa.float64())]
    )  # fmt: skip
    if outcomes is None:
        return schema.empty_table()
    tried = [(trial.latent, trial.kind, trial.strength, trial.draw) for trial in trials] + [(-1, "gap", 0.0, 0)]
    latent, kind, strength, draw = zip(*(one for one in tried for _ in range(n)), strict=True)
    columns = {
        "latent": latent,
        "kind": kind,
        "strength": strength,
        "draw": draw,
        "pair": [pair.pair.id for _ in tried for pair in pairs],
        "effect": np.concatenate([outcomes.effects.reshape(-1), outcomes.gap]),
        "damage_kl": pa.array(np.repeat([*outcomes.kl, np.nan], n), from_pandas=True),
        "damage_ce": pa.array(np.repeat([*outcomes.ce, np.nan], n), from_pandas=True),
    }
    return pa.table(columns, schema=schema)
