"""From patched values to tables: one row a cell and pair, then means over pairs with their uncertainty.

Prompts of different lengths are aligned at their end, where the answer is read. A cell's mean is taken over
the pairs that have the cell; a family of tests is made of the cells that every pair has. `effect` is patched
minus unpatched, so that 0 is "nothing happened" in both directions; `normalised_effect` is (patched -
corrupted) / (clean - corrupted), so that 0 is the corrupted and 1 the clean run in both directions. Per
pair it is kept as it is; its mean over pairs is the ratio of the means, since one pair with a tiny gap
would otherwise outweigh all the others.

Every row says by which `method` its effect was found. `approximate` is the effect as gradients estimate it and
`exact` as a forward pass gives it; a row of an approximation has the latter only where it was verified, and its
`patched` and `effect` are estimates.

Cells of the stream and of heads are corrected by max-T, which holds the chance of a single false finding.
Neurons and latents are searched by the thousand and followed up later: there the share of false findings is
held (Benjamini and Hochberg), over those that were patched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .. import stats
from .pairs import EncodedPair, Pair, Refusal
from .sites import Label

__all__ = ["EFFECTS", "KEY", "cell_table", "effect_rows", "effect_table", "pair_table"]

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
        ("layers", pa.string()),
        ("head", pa.int32()),
        ("neuron", pa.int32()),
        ("latent", pa.int32()),
        ("part", pa.string()),
        ("span", pa.string()),
        ("edge", pa.string()),
        ("method", pa.string()),
        ("approximate", pa.float64()),
        ("exact", pa.float64()),
    ]
)
KEY = (
    "layers",
    "layer",
    "head",
    "neuron",
    "part",
    "latent",
    "edge",
    "span",
    "position_from_end",
)  # a cell, in the table's order
Floats = NDArray[np.float64]
_SAME = 1e-6  # rounding of a metric that is exactly the same for all pairs


def effect_table(
    pairs: Sequence[str],
    tokens: Sequence[Sequence[str]],
    site: str,
    layer: int,
    direction: str,
    values: Mapping[str, tuple[Floats, Floats, Floats]],
) -> pa.Table:
    """Rows of one layer in one direction for b pairs of p tokens, a cell a position (schema `EFFECTS`).

    Args:
        pairs: ids [b].
        tokens: strings of the clean prompt's tokens [b][p].
        site: the patched site.
        layer: the patched layer.
        direction: `denoising` or `noising`.
        values: metric -> (clean [b], corrupted [b], patched [b, p]).
    """
    cubes = {name: (clean, corrupted, patched[:, None]) for name, (clean, corrupted, patched) in values.items()}
    places = [(at, None) for at in range(len(tokens[0]))]
    return effect_rows(pairs, tokens, site, (layer,), direction, [Label()], places, cubes)


def effect_rows(
    pairs: Sequence[str],
    tokens: Sequence[Sequence[str]],
    site: str,
    layers: Sequence[int],
    direction: str,
    labels: Sequence[Label],
    places: Sequence[tuple[int | None, str | None]],
    values: Mapping[str, tuple[Floats, Floats, Floats]],
    roles: Sequence[Mapping[int, str]] | None = None,
    *,
    method: str = "exact",
    exact: Mapping[str, Floats] | None = None,
) -> pa.Table:
    """Rows of one layer, or of a window of layers, in one direction (schema `EFFECTS`).

    Args:
        pairs: ids [b].
        tokens: strings of the clean prompt's tokens [b][p].
        site: the patched site.
        layers: the layers that are patched together.
        direction: `denoising` or `noising`.
        labels: what the u units are called.
        places: (position, span) of the w places; one of the two is None.
        values: metric -> (clean [b], corrupted [b], patched [b, u, w], NaN where a pair lacks the place).
        roles: per pair, position -> name of the marked span that it belongs to.
        method: how `patched` was found.
        exact: metric -> patched values [b, u, w] of a forward pass, NaN where there was none; for approximations.
    """
    b, u, w = len(pairs), len(labels), len(places)
    length = len(tokens[0])
    row, unit, place = (index.ravel() for index in np.indices((b, u, w)))
    columns: dict[str, NDArray] = {
        "pair": _objects(pairs)[row],
        "site": _constant(site, row),
        "layer": np.full(len(row), layers[0]),
        "position": _objects([at for at, _ in places])[place],
        "position_from_end": _objects([None if at is None else at - length for at, _ in places])[place],
        "direction": _constant(direction, row),
        "token": np.array([[None if at is None else some[at] for at, _ in places] for some in tokens], dtype=object)[
            row, place
        ],
        "role": np.array(
            [[None if at is None else own.get(at) for at, _ in places] for own in roles or [{}] * b], dtype=object
        )[row, place],
        "layers": _constant(f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else None, row),
        "span": _objects([span for _, span in places])[place],
        **{name: _objects([getattr(x, name) for x in labels])[unit] for name in Label._fields},
    }
    parts = []
    for metric, (clean, corrupted, patched) in values.items():
        flat = patched.ravel()
        base = (corrupted if direction == "denoising" else clean)[row]
        gap = (clean - corrupted)[row]
        numbers = {
            "metric": _constant(metric, row),
            "clean": clean[row],
            "corrupted": corrupted[row],
            "patched": flat,
            "effect": flat - base,
            "normalised_effect": np.divide(flat - corrupted[row], gap, out=np.full(flat.shape, np.nan), where=gap != 0),
            "method": _constant(method, row),
            "approximate": np.full(flat.shape, np.nan) if method == "exact" else flat - base,
            "exact": flat - base if exact is None else exact[metric].ravel() - base,
        }
        there = ~np.isnan(flat)
        both = {**columns, **numbers}
        parts.append(pa.table({f.name: pa.array(both[f.name][there], f.type, from_pandas=True) for f in EFFECTS}))
    return pa.concat_tables(parts)


def cell_table(
    effects: pa.Table, *, draws: int = 2000, seed: int = 0, clusters: Mapping[str, object] | None = None
) -> pa.Table:
    """Means over pairs, one row per metric, direction and cell.

    Columns: metric, direction, site, the cell (layer, `layers` of a window, head, neuron, latent, part, span,
    position_from_end, and position, null where lengths differ, or edge), the method, n_pairs, mean_effect with the
    95 % bootstrap limits low and high and the standard deviation sd over pairs, normalised_effect (ratio of means) with
    normalised_low and normalised_high, p (sign flips of pairs, this cell alone), p_max_t (family-wise over the
    cells of this metric and direction; null for neurons, latents, and where a pair lacks the cell), q_value
    (false discoveries among the neurons or latents; else null), floor (the smallest p that this many pairs can
    give) and looks (cells that are corrected for together). No p-value is given for a single pair, nor where
    effects can only have one sign: KL, JS or accuracy under noising, where every unpatched run is at the metric's end.
    Last, the mean `approximate` and `exact` effects; of an approximation every other number is made from estimates, and
    `exact` is null where the cell was not verified.

    Args:
        effects: rows of schema `EFFECTS`, at least one pair.
        draws: bootstrap samples, and random sign flips beyond 12 pairs.
        seed: seed of both.
        clusters: pair -> what it is resampled and flipped with; default every pair by itself.
    """
    metrics, directions = (effects[name].to_numpy(zero_copy_only=False) for name in ("metric", "direction"))
    parts = [
        _cells(effects.filter(pa.array((metrics == m) & (directions == d))), m, d, draws, seed, clusters)
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
        rows.append({**pair.row(), **more})
    return pa.Table.from_pylist(rows)


def _cells(
    rows: pa.Table, metric: str, direction: str, draws: int, seed: int, clusters: Mapping[str, object] | None
) -> pa.Table:
    ids, pair = np.unique(rows["pair"].to_numpy(zero_copy_only=False), return_inverse=True)
    codes, first, cell = np.unique(_codes(rows), return_index=True, return_inverse=True)
    n, size = len(ids), len(codes)
    effect, restored = np.full((2, n, size), np.nan)
    gap = np.empty(n)
    corrupted = rows["corrupted"].to_numpy()
    effect[pair, cell] = rows["effect"].to_numpy()
    restored[pair, cell] = rows["patched"].to_numpy() - corrupted
    gap[pair] = rows["clean"].to_numpy() - corrupted
    there = ~np.isnan(effect)  # [n, cells]
    labels = None if clusters is None else np.array([str(clusters[name]) for name in ids], dtype=object)
    found = _intervals(effect, restored, gap, there, draws, seed, labels)
    keys = rows.take(pa.array(first)).select([*KEY, "site", "position"])
    tested = _tests(effect, there, keys, draws, seed, labels)
    base = rows["corrupted" if direction == "denoising" else "clean"].to_numpy()
    if len(set(ids if labels is None else labels)) < 2 or _one_sided(base, effect):
        tested |= {name: np.full(size, np.nan) for name in ("p", "p_max_t", "q_value")}
    lengths = set(pc.call_function("subtract", [rows["position"], rows["position_from_end"]]).to_pylist()) - {None}
    columns: dict[str, object] = {
        "metric": pa.array([metric] * size),
        "direction": pa.array([direction] * size),
        "site": keys["site"],
        **{name: keys[name] for name in KEY},
        "position": keys["position"] if len(lengths) <= 1 else pa.nulls(size, pa.int32()),
        "n_pairs": pa.array(there.sum(axis=0), pa.int32()),
    }
    both = {name: _means(rows, name, (len(ids), size), (pair, cell)) for name in ("approximate", "exact")}
    for name, values in {**found, **tested, **both}.items():
        columns[name] = pa.array(values, pa.int32() if name == "looks" else pa.float64(), from_pandas=True)
    return pa.table({**columns, "method": rows["method"].take(pa.array(first))})


def _means(rows: pa.Table, name: str, shape: tuple[int, int], at: tuple[NDArray, NDArray]) -> Floats:
    """Means [cells] of a column over the pairs that have a value; NaN where none has."""
    values = np.full(shape, np.nan)
    values[at] = rows[name].to_numpy(zero_copy_only=False)
    known = ~np.isnan(values)
    return np.divide(
        np.nansum(values, axis=0), known.sum(axis=0), out=np.full(shape[1], np.nan), where=known.any(axis=0)
    )


def _tests(
    effect: Floats, there: NDArray[np.bool_], keys: pa.Table, draws: int, seed: int, clusters: NDArray | None
) -> dict[str, Floats]:
    """p, p_max_t, q_value, floor and looks of each cell."""
    size = effect.shape[1]
    searched, part = (
        np.any([keys[name].is_valid().to_numpy(zero_copy_only=False) for name in names], axis=0)
        for names in (("neuron", "latent", "edge"), ("part",))
    )
    shared = there.all(axis=0)
    false_discovery = bool(searched.any() or part.any())
    looks = int((shared & searched).sum()) if false_discovery else int(shared.sum())
    found = {name: np.full(size, np.nan) for name in ("p", "p_max_t", "q_value")}
    enough = stats.draws_for(2 * looks if false_discovery else 1, least=max(draws, 5000))
    test = stats.sign_flip_max_t(effect[:, shared], draws=enough, seed=seed, clusters=clusters)
    found["p"][shared] = test.p
    if false_discovery:
        among = shared & searched
        found["q_value"][among] = stats.benjamini_hochberg(found["p"][among])
    else:
        found["p_max_t"][shared] = test.p_max_t
    return {**found, "floor": np.full(size, test.floor), "looks": np.full(size, looks)}


def _one_sided(base: Floats, effect: Floats) -> bool:
    """Whether effects can only have one sign, because every unpatched run is at the metric's end.

    KL from the clean run is 0 there, and whatever is done to the clean run makes it larger; flipping signs would
    then call every cell significant.
    """
    known = effect[~np.isnan(effect)]
    return bool(np.ptp(base) <= _SAME and (known.min() >= -_SAME or known.max() <= _SAME))


def _codes(rows: pa.Table) -> NDArray[np.int64]:
    """One number a cell [n_rows], in the order of `KEY`; what is null comes first."""
    code = np.zeros(len(rows), dtype=np.int64)
    for name in KEY:
        column = rows[name]
        if pa.types.is_string(column.type):
            words = column.to_pylist()
            order = {word: at for at, word in enumerate(dict.fromkeys(w for w in words if w is not None))}
            values = np.array([order.get(word, -1) for word in words], dtype=np.int64)
        else:
            numbers = column.to_numpy(zero_copy_only=False).astype(np.float64)
            low = np.nanmin(numbers) if not np.isnan(numbers).all() else 0.0
            values = np.where(np.isnan(numbers), -1, numbers - low).astype(np.int64)
        code = code * (int(values.max(initial=0)) + 2) + values + 1
    return code


def _intervals(
    effect: Floats,
    restored: Floats,
    gap: Floats,
    there: NDArray[np.bool_],
    draws: int,
    seed: int,
    clusters: NDArray | None,
) -> dict[str, Floats]:
    """Means and limits [cells]; cells of the same pairs share their bootstrap samples."""
    names = ("mean_effect", "low", "high", "sd", "normalised_effect", "normalised_low", "normalised_high")
    found = {name: np.full(effect.shape[1], np.nan) for name in names}
    for pattern in np.unique(there, axis=1).T:
        cells = (there == pattern[:, None]).all(axis=0)
        labels = None if clusters is None else clusters[pattern]
        part = effect[pattern][:, cells]
        mean = stats.bootstrap_interval(part, labels, draws=draws, seed=seed)
        ratio = stats.bootstrap_interval(restored[pattern][:, cells], labels, draws=draws, seed=seed, over=gap[pattern])
        sd = part.std(axis=0, ddof=1) if len(part) > 1 else np.full(part.shape[1], np.nan)
        values = (mean.mean, mean.low, mean.high, sd, ratio.mean, ratio.low, ratio.high)
        for name, column in zip(names, values, strict=True):
            found[name][cells] = column
    return found


def _objects(items: Sequence[object]) -> NDArray:
    return np.array(items, dtype=object)


def _constant(value: str | None, like: NDArray) -> NDArray:
    return np.full(len(like), value, dtype=object)
