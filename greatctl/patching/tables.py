"""From patched values to tables: one row a cell and pair, then means over pairs with their uncertainty.

Prompts of different lengths are aligned at their end, where the answer is read. A cell's mean is taken over
the pairs that have the cell; the max-T family is made of the cells that every pair has. `effect` is patched
minus unpatched, so that 0 is "nothing happened" in both directions; `normalised_effect` is (patched -
corrupted) / (clean - corrupted), so that 0 is the corrupted and 1 the clean run in both directions. Per
pair it is kept as it is; its mean over pairs is the ratio of the means, since one pair with a tiny gap
would otherwise outweigh all the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import stats
from .pairs import EncodedPair, Pair, Refusal

__all__ = ["EFFECTS", "cell_table", "effect_table", "pair_table"]

EFFECTS = pa.schema(
    [
        ("pair", pa.string()),
        ("site", pa.string()),
        ("layer", pa.int32()),
        ("position", pa.int32()),
        ("position_from_end", pa.int32()),
        ("direction", pa.string()),
        ("metric", pa.string()),
        ("clean", pa.float64()),
        ("corrupted", pa.float64()),
        ("patched", pa.float64()),
        ("effect", pa.float64()),
        ("normalised_effect", pa.float64()),
        ("token", pa.string()),
        ("role", pa.string()),
    ]
)
_NEARLY = 1 - 1e-6  # cells this close to the largest count as equal, so that rounding does not choose the peak
Floats = NDArray[np.float64]


def effect_table(
    pairs: Sequence[str],
    tokens: Sequence[Sequence[str]],
    site: str,
    layer: int,
    direction: str,
    values: Mapping[str, tuple[Floats, Floats, Floats]],
) -> pa.Table:
    """Rows of one layer in one direction for b pairs of p tokens (schema `EFFECTS`).

    Args:
        pairs: ids [b].
        tokens: strings of the clean prompt's tokens [b][p].
        site: the patched site.
        layer: the patched layer.
        direction: `denoising` or `noising`.
        values: metric -> (clean [b], corrupted [b], patched [b, p]).
    """
    n, length = len(pairs), len(tokens[0])
    place = np.tile(np.arange(length), n)
    parts = []
    for metric, (clean, corrupted, patched) in values.items():
        base = corrupted if direction == "denoising" else clean
        gap = (clean - corrupted)[:, None]
        normalised = np.divide(patched - corrupted[:, None], gap, out=np.full(patched.shape, np.nan), where=gap != 0)
        columns = {
            "pair": np.repeat(np.array(pairs, dtype=object), length),
            "site": [site] * (n * length),
            "layer": np.full(n * length, layer),
            "position": place,
            "position_from_end": place - length,
            "direction": [direction] * (n * length),
            "metric": [metric] * (n * length),
            "clean": clean.repeat(length),
            "corrupted": corrupted.repeat(length),
            "patched": patched.ravel(),
            "effect": (patched - base[:, None]).ravel(),
            "normalised_effect": normalised.ravel(),
            "token": [token for row in tokens for token in row],
            "role": [None] * (n * length),
        }
        parts.append(pa.table({f.name: pa.array(columns[f.name], f.type, from_pandas=True) for f in EFFECTS}))
    return pa.concat_tables(parts)


def cell_table(effects: pa.Table, *, draws: int = 2000, seed: int = 0) -> pa.Table:
    """Means over pairs, one row per metric, direction, layer and position from the end.

    Columns: metric, direction, site, layer, position_from_end, position (null where lengths differ),
    n_pairs, mean_effect with the 95 % bootstrap limits low and high, normalised_effect (ratio of means)
    with normalised_low and normalised_high, p_max_t (sign flips of pairs, family-wise over layers and
    positions of this metric and direction; null where a pair lacks the cell) and floor (the smallest p that
    this many pairs can give).

    Args:
        effects: rows of schema `EFFECTS`, at least one pair.
        draws: bootstrap samples, and random sign flips beyond 12 pairs.
        seed: seed of both.
    """
    metrics, directions = (effects[name].to_numpy(zero_copy_only=False) for name in ("metric", "direction"))
    parts = [
        _cells(effects.filter(pa.array((metrics == m) & (directions == d))), m, d, draws, seed)
        for m in dict.fromkeys(metrics.tolist())
        for d in dict.fromkeys(directions.tolist())
    ]
    return pa.concat_tables(parts)


def pair_table(
    pairs: Sequence[Pair],
    executed: Sequence[EncodedPair],
    refused: Sequence[Refusal],
    words: Mapping[str, tuple[list[str], list[str]]],
) -> pa.Table:
    """Every pair in the order of its file, with `status` (`executed` or `refused`) and the `reason` of a
    refusal.

    Args:
        pairs: all pairs.
        executed: those that were swept.
        refused: those that were not.
        words: pair id -> token strings of the clean and of the corrupted prompt.
    """
    encoded = {pair.pair.id: pair for pair in executed}
    reasons = {refusal.pair.id: refusal.reason for refusal in refused}
    rows = []
    for pair in pairs:
        found = encoded.get(pair.id)
        clean, corrupted = words.get(pair.id, (None, None))
        more = {
            "status": "executed" if found else "refused",
            "reason": reasons.get(pair.id, ""),
            "n_tokens": found.length if found else None,
            "first_difference": found.first_difference if found else None,
            "tokens": clean,
            "corrupted_tokens": corrupted,
        }
        rows.append({**asdict(pair), **more})
    return pa.Table.from_pylist(rows)


def _cells(rows: pa.Table, metric: str, direction: str, draws: int, seed: int) -> pa.Table:
    ids, pair = np.unique(rows["pair"].to_numpy(zero_copy_only=False), return_inverse=True)
    layer, back = rows["layer"].to_numpy(), rows["position_from_end"].to_numpy()
    n, n_layers, n_places = len(ids), int(layer.max()) + 1, -int(back.min())
    effect, restored = np.full((2, n, n_layers, n_places), np.nan)
    gap = np.empty(n)
    corrupted = rows["corrupted"].to_numpy()
    effect[pair, layer, back + n_places] = rows["effect"].to_numpy()
    restored[pair, layer, back + n_places] = rows["patched"].to_numpy() - corrupted
    gap[pair] = rows["clean"].to_numpy() - corrupted
    there = ~np.isnan(effect[:, 0])  # [n, n_places]
    found = _intervals(effect, restored, gap, there, draws, seed)
    p = np.full((n_layers, n_places), np.nan)
    shared = there.all(axis=0)
    test = stats.sign_flip_max_t(effect[:, :, shared].reshape(n, -1), draws=max(draws, 5000), seed=seed)
    p[:, shared] = test.p_max_t.reshape(n_layers, -1)
    size = n_layers * n_places
    from_end = np.tile(np.arange(-n_places, 0), n_layers)
    columns: dict[str, pa.Array] = {
        "metric": pa.array([metric] * size),
        "direction": pa.array([direction] * size),
        "site": pa.array([rows["site"][0].as_py()] * size),
        "layer": pa.array(np.arange(n_layers).repeat(n_places), pa.int32()),
        "position_from_end": pa.array(from_end, pa.int32()),
        "position": pa.array(from_end + n_places if shared.all() else [None] * size, pa.int32()),
        "n_pairs": pa.array(np.tile(there.sum(axis=0), n_layers), pa.int32()),
    }
    for name, values in {**found, "p_max_t": p}.items():
        columns[name] = pa.array(values.ravel(), pa.float64(), from_pandas=True)
    columns["floor"] = pa.array(np.full(size, test.floor))
    return pa.table(columns)


def _intervals(
    effect: Floats, restored: Floats, gap: Floats, there: NDArray[np.bool_], draws: int, seed: int
) -> dict[str, Floats]:
    """Means and limits [n_layers, n_places]; places of the same pairs share their bootstrap samples."""
    names = ("mean_effect", "low", "high", "normalised_effect", "normalised_low", "normalised_high")
    found = {name: np.full(effect.shape[1:], np.nan) for name in names}
    for pattern in np.unique(there, axis=1).T:
        places = (there == pattern[:, None]).all(axis=0)
        shape = (effect.shape[1], int(places.sum()))
        part = effect[pattern][:, :, places].reshape(pattern.sum(), -1)
        mean = stats.bootstrap_interval(part, draws=draws, seed=seed)
        part = restored[pattern][:, :, places].reshape(pattern.sum(), -1)
        ratio = stats.bootstrap_interval(part, draws=draws, seed=seed, over=gap[pattern])
        for name, values in zip(
            names, (mean.mean, mean.low, mean.high, ratio.mean, ratio.low, ratio.high), strict=True
        ):
            found[name][:, places] = values.reshape(shape)
    return found
