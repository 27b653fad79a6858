"""One latent as a page, from the sealed tables: nothing is computed again."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["latent_page"]

_EXAMPLE = (
    "rank",
    "window",
    "position",
    "activation",
    "work",
    "author",
    "unit",
    "role",
    "before",
    "token",
    "after",
)


def latent_page(folder: Path, latent: int) -> dict[str, object]:
    """Everything that the tables in `folder` say about a latent, as JSON values.

    Keys: latent, density, mean, max, top_tokens, top_logits and bottom_logits ([{token, logit}]), units
    ([{unit, role, mean, density}], strongest first), contrast (a row of contrasts.parquet, None for a latent
    that never fires) and examples.
    """
    rows = {name: _rows(folder, name, latent) for name in ("latents", "units", "contrasts", "examples")}
    facts = rows["latents"][0]
    units = sorted(rows["units"], key=lambda row: -row["mean"])
    contrast = {k: v for k, v in rows["contrasts"][0].items() if v == v} if rows["contrasts"] else None
    return {
        **{name: facts[name] for name in ("latent", "density", "mean", "max", "top_tokens")},
        **{
            f"{side}_logits": [
                {"token": token, "logit": value}
                for token, value in zip(facts[f"{side}_logit_tokens"], facts[f"{side}_logits"], strict=True)
            ]
            for side in ("top", "bottom")
        },
        "units": [{name: row[name] for name in ("unit", "role", "mean", "density")} for row in units],
        "contrast": contrast,
        "examples": [{name: row[name] for name in _EXAMPLE} for row in rows["examples"]],
    }


def _rows(folder: Path, name: str, latent: int) -> list[dict]:
    table = pq.read_table(folder / f"{name}.parquet", filters=pc.field("latent") == latent)
    return table.to_pylist()
