"""Decoder rows compared: with each other (neighbours), and with those of another SAE (matching).

Two close rows in one SAE are one feature learnt twice, or one split in two. Rows that return in an SAE from
another seed belong to the model and the texts; spare ones are noise of the seed, even in toys.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["best_cosines", "matching", "neighbours"]

_PERCENTILES = (5, 25, 50, 75, 95)
_PAIRS = 10
_BLOCK = 2**26  # cosines at once
_WORK = {"cuda": 1e15}  # multiplications that may be spent; elsewhere 2e12, about half a minute
_ASSIGNED = 8192  # rows of the largest Hungarian matching: it takes half a GiB, and time with the cube


def neighbours(W_dec: Tensor) -> dict[str, object]:
    """Each latent's largest cosine to another latent.

    Args:
        W_dec: [d_sae, d]; rows of norm 0 have no direction and are left out.

    Returns:
        `compared` (latents that were asked: all, or an even sample where the SAE is too wide for the device),
        `max_cosine_percentiles`, `max_cosine_mean`, `above_0.9` (share), and `closest`: up to ten pairs
        {latent, neighbour, cosine}. {} where there are not two directions.
    """
    rows, kept = _unit(W_dec)
    if rows.shape[0] < 2:
        return {}
    asked = torch.arange(0, rows.shape[0], _stride(rows.shape[0] ** 2 * rows.shape[1], rows.device))
    best, place = best_cosines(rows[asked.to(rows.device)], rows, own=asked)
    points = torch.tensor(_PERCENTILES, dtype=torch.float64) / 100
    spread = torch.quantile(best.double(), points).tolist()
    return {
        "compared": asked.numel(),
        "max_cosine_percentiles": dict(zip(map(str, _PERCENTILES), spread, strict=True)),
        "max_cosine_mean": float(best.double().mean()),
        "above_0.9": float((best > 0.9).double().mean()),
        "closest": _closest(kept[asked], kept[place], best),
    }


def matching(ours: Tensor, theirs: Tensor) -> dict[str, object]:
    """How far two SAEs have the same decoder rows; [a, d] and [b, d].

    Returns:
        `ours_mean_max_cosine` and `theirs_mean_max_cosine`: mean over the rows of one of the largest cosine to
        a row of the other. `hungarian_mean_cosine`: mean over the one-to-one pairs that make the sum largest
        (the same in both directions), with `ours_matched_0.7` and `theirs_matched_0.7`, the share of all rows
        that have a partner of cosine 0.7 or more in it. The one-to-one pairs are None above 8192 rows.
    """
    a, _ = _unit(ours)
    b, _ = _unit(theirs.to(ours.device))
    if not a.shape[0] or not b.shape[0]:
        return {}
    forth, back = best_cosines(a, b)[0], best_cosines(b, a)[0]
    found: dict[str, object] = {
        "ours_mean_max_cosine": float(forth.double().mean()),
        "theirs_mean_max_cosine": float(back.double().mean()),
        "hungarian_mean_cosine": None,
        "ours_matched_0.7": None,
        "theirs_matched_0.7": None,
    }
    if max(a.shape[0], b.shape[0]) <= _ASSIGNED:
        cosines = (a @ b.T).cpu().numpy()
        pairs = torch.from_numpy(cosines[linear_sum_assignment(cosines, maximize=True)])
        found["hungarian_mean_cosine"] = float(pairs.double().mean())
        close = int((pairs >= 0.7).sum())
        found["ours_matched_0.7"], found["theirs_matched_0.7"] = close / ours.shape[0], close / theirs.shape[0]
    return found


def best_cosines(asked: Tensor, rows: Tensor, *, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest cosine of each unit row of `asked` [a, d] to `rows` [b, d], float32 [a], and its place [a], on the CPU.

    Args:
        own: place of each asked row in `rows`, which does not count.
    """
    best, place = [], []
    size = max(1, _BLOCK // rows.shape[0])
    for start in range(0, asked.shape[0], size):
        cosines = asked[start : start + size] @ rows.T
        if own is not None:
            mine = own[start : start + size].to(rows.device)
            cosines[torch.arange(mine.numel(), device=rows.device), mine] = -2
        values, at = cosines.max(dim=1)
        best.append(values.cpu())
        place.append(at.cpu())
    return torch.cat(best), torch.cat(place)


def _unit(W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of norm 1 (zero rows left out), and the number of each, on the CPU."""
    norms = W_dec.float().norm(dim=1)
    kept = (norms > 0).nonzero().squeeze(1)
    return W_dec.float()[kept] / norms[kept, None], kept.cpu()


def _stride(products: int, device: torch.device) -> int:
    return max(1, -(-products // int(_WORK.get(device.type, 2e12))))


def _closest(latents: Tensor, others: Tensor, cosines: Tensor) -> list[dict[str, object]]:
    pairs: dict[tuple[int, int], float] = {}
    for at in cosines.argsort(descending=True).tolist():
        a, b = sorted((int(latents[at]), int(others[at])))
        pairs.setdefault((a, b), float(cosines[at]))
        if len(pairs) == _PAIRS:
            break
    return [{"latent": a, "neighbour": b, "cosine": c} for (a, b), c in pairs.items()]
