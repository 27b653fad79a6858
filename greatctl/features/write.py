"""The feature tables on disk: what `interpret` seals and the report reads (and see `hypotheses`).

latents.parquet     one row a latent. density, mean, mean_when_firing, max, fired; histogram (tokens by activation, half
                    octaves from 2^-10 up); token_share and position_share (R² of token id and of position, see
                    `shares`; token_ids_apart says for which share of the tokens the id is known exactly); top_tokens;
                    top and bottom logits with kurtosis and skew; neighbours (decoder rows) with cosine; cofiring
                    latents with jaccard
examples.parquet    passages, with work, author, characters of the clean text and the heat of each token. kind is `top`
                    (strongest, one a window, no text twice), `decile` (decile 1 to 10 of the range up to the largest
                    activation, drawn evenly from a sample of windows) or `near` (the latent is silent over the whole
                    passage; of all such, those whose centred activation at `token` has the largest cosine to the
                    latent's direction)
units.parquet       latent x unit (author or subject): mean activation and share of tokens that fire, with the 95 % t
                    interval of the mean over works, or over stretches of the work where there is one alone (`interval`)
stretches.parquet   latent x document, for latents that fire: mean activation along the work, up to 50 stretches
contrasts.parquet   characters against controls, with the unit as the unit, for every latent that fires
hypotheses.parquet  the candidates, chosen on training units alone, with verdict and reason
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from ..store.tables import write_table
from .best import BEFORE, Kept
from .examples import Decoder
from .logits import LatentLogits
from .neighbours import neighbours
from .sample import DECILES
from .shares import mean_interval, position_share, token_share
from .tables import FeatureTables

__all__ = ["Corpus", "write_stretches", "write_tables", "write_units"]

TOP_TOKENS = 5
_BLOCK = 1024  # latents whose examples are turned into text at once
_STRETCH_NUMBERS = 2**23


@dataclass(frozen=True)
class Corpus:
    """The windows that were read: input_ids and token_end [n_windows, window], length [n_windows], their documents.

    `token_end` is the character of the document's clean text at which a token ends.
    """

    input_ids: Tensor
    token_end: Tensor
    length: Tensor
    documents: Sequence[Mapping[str, object]]
    document_of_window: Sequence[int]

    @cached_property
    def _arrays(self) -> tuple[NDArray, NDArray, NDArray]:
        """The three as NumPy, whose single entries are quick to get."""
        return self.input_ids.numpy(), self.token_end.numpy(), self.length.numpy()

    def ids(self, window: int) -> list[int]:
        """A window's token ids without padding."""
        ids, _, length = self._arrays
        return ids[window, : length[window]].tolist()

    def characters(self, window: int, first: int, n: int) -> tuple[int, int]:
        """The characters (from, to) of the clean text that `n` tokens from position `first` on cover."""
        ends = self._arrays[1]
        return int(ends[window, max(first - 1, 0)]), int(ends[window, first + n - 1])


def write_tables(
    folder: Path,
    tables: FeatureTables,
    corpus: Corpus,
    decoder: Decoder,
    logits: LatentLogits | None,
    *,
    directions: Tensor | None = None,
) -> None:
    """Write latents.parquet and examples.parquet.

    Args:
        directions: rows of W_dec, for the neighbours.
    """
    blocks = list(_example_blocks(tables, corpus, decoder))
    examples = pa.concat_tables(blocks) if blocks else _examples([])
    write_table(folder / "examples.parquet", examples)
    n, count = max(tables.n_tokens, 1), len(tables.peak)
    columns: dict[str, object] = {
        "latent": pa.array(range(count), pa.int32()),
        "density": (tables.fired / n).numpy(),
        "mean": (tables.total / n).numpy(),
        "mean_when_firing": (tables.total / tables.fired.clamp_min(1)).numpy(),
        "max": tables.peak.numpy(),
        "fired": tables.fired.numpy(),
        "histogram": pa.array(tables.histogram.tolist(), pa.list_(pa.int64())),
        "token_share": _known(token_share(tables)),
        "position_share": _known(position_share(tables)),
        "token_ids_apart": pa.array([tables.token_own] * count, pa.float64()),
        "top_tokens": pa.array(_top_tokens(examples, count), pa.list_(pa.string())),
    }
    columns |= _logit_columns(logits, count, decoder)
    columns |= _near_columns(tables, directions)
    write_table(folder / "latents.parquet", pa.table(columns))


def _known(values: NDArray[np.float64]) -> pa.Array:
    """Numbers with null where there is none."""
    return pa.array(values, pa.float64(), from_pandas=True)


def _near_columns(tables: FeatureTables, directions: Tensor | None) -> dict[str, object]:
    """Decoder neighbours and co-firing latents of each latent."""
    count = len(tables.peak)
    ids, cosines = neighbours(directions) if directions is not None else (np.zeros((count, 0)), np.zeros((count, 0)))
    together, jaccard = tables.cofiring.latent, tables.cofiring.jaccard
    found = [[int(i) for i in row if i >= 0] for row in together]
    return {
        "neighbours": pa.array(ids.tolist(), pa.list_(pa.int32())),
        "neighbour_cosines": pa.array(cosines.tolist(), pa.list_(pa.float32())),
        "cofiring": pa.array(found, pa.list_(pa.int32())),
        "cofiring_jaccard": pa.array(
            [row[: len(names)].tolist() for row, names in zip(jaccard, found, strict=True)], pa.list_(pa.float32())
        ),
    }


def write_units(
    folder: Path,
    tables: FeatureTables,
    documents: Sequence[Mapping[str, object]],
    unit: str,
    alive: Sequence[int],
) -> None:
    """Write units.parquet for the latents in `alive`; a unit's documents count equally, as in the tests.

    Args:
        unit: the document column that names the unit (`author` or `unit`).
    """
    names = sorted({(str(d[unit]), str(d["role"])) for d in documents})
    shares = (tables.document_fired.double() / tables.document_tokens.clamp_min(1)[:, None]).numpy()
    means = tables.document_means
    parts = []
    for name, role in names:
        rows = [i for i, d in enumerate(documents) if (str(d[unit]), str(d["role"])) == (name, role)]
        over, values = "works", means[rows][:, alive]
        if len(rows) == 1:
            over, values = "stretches", _stretch_means(tables, rows[0])[:, alive]
        low, high = mean_interval(values)
        part = {
            "latent": pa.array(alive, pa.int32()),
            "unit": pa.array([name] * len(alive), pa.string()),
            "role": pa.array([role] * len(alive), pa.string()),
            "n_documents": pa.array([len(rows)] * len(alive), pa.int32()),
            "n_tokens": pa.array([int(tables.document_tokens[rows].sum())] * len(alive), pa.int64()),
            "mean": means[rows][:, alive].mean(axis=0),
            "low": _known(low),
            "high": _known(high),
            "interval": pa.array([over] * len(alive), pa.string()),
            "density": shares[rows][:, alive].mean(axis=0),
        }
        parts.append(pa.table(part))
    write_table(folder / "units.parquet", pa.concat_tables(parts).sort_by([("latent", "ascending")]))


def write_stretches(
    folder: Path, tables: FeatureTables, documents: Sequence[Mapping[str, object]], alive: Sequence[int]
) -> None:
    """Write stretches.parquet: for each latent in `alive`, its mean activation along every work.

    Where that were too many numbers, those of the latents that fire most often.
    """
    most = _STRETCH_NUMBERS // max(tables.stretch_tokens.numel(), 1)
    frequent = sorted(alive, key=lambda latent: (-int(tables.fired[latent]), latent))[:most]
    alive = sorted(frequent)
    parts = []
    for number, document in enumerate(documents):
        means = _stretch_means(tables, number)[:, alive].astype(np.float32)
        ends = np.arange(len(alive) + 1, dtype=np.int32) * len(means)
        column = {
            "latent": pa.array(alive, pa.int32()),
            "source_id": pa.array([document.get("source_id")] * len(alive), pa.string()),
            "mean": pa.ListArray.from_arrays(ends, pa.array(means.T.ravel(), pa.float32())),
        }
        parts.append(pa.table(column))
    if parts:
        write_table(folder / "stretches.parquet", pa.concat_tables(parts).sort_by([("latent", "ascending")]))


def _stretch_means(tables: FeatureTables, document: int) -> NDArray[np.float64]:
    """Mean activation in each stretch of a document that has tokens, [n, L]."""
    tokens = tables.stretch_tokens[document]
    used = tokens > 0
    return (tables.stretch_total[document][used].double() / tokens[used][:, None]).numpy()


_EXAMPLES = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("decile", pa.int32()),
        ("rank", pa.int32()),
        ("window", pa.int32()),
        ("position", pa.int32()),
        ("activation", pa.float32()),
        ("cosine", pa.float32()),
        ("source_id", pa.string()),
        ("author", pa.string()),
        ("work", pa.string()),
        ("unit", pa.string()),
        ("role", pa.string()),
        ("year", pa.int32()),
        ("char_start", pa.int64()),
        ("char_end", pa.int64()),
        ("before", pa.string()),
        ("token", pa.string()),
        ("after", pa.string()),
        ("pieces", pa.list_(pa.string())),
        ("heat", pa.list_(pa.float32())),
    ]
)
_FROM_DOCUMENT = ("source_id", "author", "work", "unit", "role", "year")


def _examples(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=_EXAMPLES)


def _example_blocks(tables: FeatureTables, corpus: Corpus, decoder: Decoder) -> Iterator[pa.Table]:
    for start in range(0, len(tables.peak), _BLOCK):
        latents = range(start, min(start + _BLOCK, len(tables.peak)))
        yield _examples([row for latent in latents for row in _examples_of(tables, corpus, decoder, latent)])


def _examples_of(tables: FeatureTables, corpus: Corpus, decoder: Decoder, latent: int) -> Iterator[dict[str, object]]:
    """Strongest passages first, then the deciles from the top down, then near misses."""
    yield from _passages(tables.top, latent, corpus, decoder, {"latent": latent, "kind": "top"})
    for decile in reversed(range(DECILES)):
        row = {"latent": latent, "kind": "decile", "decile": decile + 1}
        yield from _passages(tables.deciles, latent * DECILES + decile, corpus, decoder, row)
    yield from _passages(tables.near, latent, corpus, decoder, {"latent": latent, "kind": "near"})


def _passages(
    kept: Kept, slot: int, corpus: Corpus, decoder: Decoder, shared: Mapping[str, object]
) -> Iterator[dict[str, object]]:
    for rank, (window, position, value, heat) in enumerate(kept.found(slot)):
        passage = decoder.passage(corpus.ids(window), position)
        # heat is centred on the token; the passage may begin or end inside it
        skip = BEFORE - (position - passage.first)
        document = corpus.documents[corpus.document_of_window[window]]
        start, end = corpus.characters(window, passage.first, len(passage.pieces))
        yield {
            **shared,
            "rank": rank,
            "window": window,
            "position": position,
            "activation": float(heat[BEFORE]),
            "cosine": value if shared["kind"] == "near" else None,
            **{name: document.get(name) for name in _FROM_DOCUMENT},
            "char_start": start,
            "char_end": end,
            "before": passage.before,
            "token": passage.token,
            "after": passage.after,
            "pieces": passage.pieces,
            "heat": heat[skip : skip + len(passage.pieces)].tolist(),
        }


def _top_tokens(examples: pa.Table, n_latents: int) -> list[list[str]]:
    """The tokens on which each latent's strongest passages peak, the most frequent first."""
    found: list[Counter[str]] = [Counter() for _ in range(n_latents)]
    columns = (examples[name].to_pylist() for name in ("latent", "kind", "token"))
    for latent, kind, token in zip(*columns, strict=True):
        if kind == "top":
            found[latent][token] += 1
    return [[token for token, _ in counts.most_common(TOP_TOKENS)] for counts in found]


def _logit_columns(logits: LatentLogits | None, n_latents: int, decoder: Decoder) -> dict[str, object]:
    columns: dict[str, object] = {}
    for side in ("top", "bottom"):
        if logits is None:
            ids, values = np.zeros((n_latents, 0), dtype=int), np.zeros((n_latents, 0))
        else:
            ids = getattr(logits, f"{side}_ids").numpy()
            values = getattr(logits, f"{side}_values").numpy()
        names = [[decoder.one(int(i)) for i in row] for row in ids]
        columns[f"{side}_logit_tokens"] = pa.array(names, pa.list_(pa.string()))
        columns[f"{side}_logits"] = pa.array(values.tolist(), pa.list_(pa.float32()))
    for name in ("kurtosis", "skew"):
        known = [None] * n_latents if logits is None else getattr(logits, name).tolist()
        columns[f"logit_{name}"] = pa.array(known, pa.float32())
    return columns
