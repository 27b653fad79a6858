"""The feature tables on disk: what `interpret` seals and the report reads (and see `hypotheses`).

latents.parquet     one row a latent: density, strength, histogram, top tokens, top and bottom logits
examples.parquet    its strongest passages, one a window, with work, author, characters and the heat of each token
units.parquet       latent x unit (author or subject): mean activation and share of tokens that fire
contrasts.parquet   characters against controls, with the unit as the unit, for every latent that fires
hypotheses.parquet  the candidates, chosen on training units alone, with verdict and reason
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from ..store.tables import write_table
from .examples import Decoder
from .logits import LatentLogits
from .tables import BEFORE, FeatureTables

__all__ = ["Corpus", "write_tables", "write_units"]

TOP_TOKENS = 5
_BLOCK = 1024  # latents whose examples are turned into text at once


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

    def ids(self, window: int) -> list[int]:
        """A window's token ids without padding."""
        return self.input_ids[window, : int(self.length[window])].tolist()

    def characters(self, window: int, first: int, n: int) -> tuple[int, int]:
        """The characters (from, to) of the clean text that `n` tokens from position `first` on cover."""
        return int(self.token_end[window, max(first - 1, 0)]), int(self.token_end[window, first + n - 1])


def write_tables(
    folder: Path, tables: FeatureTables, corpus: Corpus, decoder: Decoder, logits: LatentLogits | None
) -> None:
    """Write latents.parquet and examples.parquet."""
    blocks = list(_example_blocks(tables, corpus, decoder))
    examples = pa.concat_tables(blocks) if blocks else _examples([])
    write_table(folder / "examples.parquet", examples)
    n = max(tables.n_tokens, 1)
    columns: dict[str, object] = {
        "latent": pa.array(range(len(tables.peak)), pa.int32()),
        "density": (tables.fired / n).numpy(),
        "mean": (tables.total / n).numpy(),
        "mean_when_firing": (tables.total / tables.fired.clamp_min(1)).numpy(),
        "max": tables.peak.numpy(),
        "fired": tables.fired.numpy(),
        "histogram": pa.array(tables.histogram.tolist(), pa.list_(pa.int64())),
        "top_tokens": pa.array(_top_tokens(examples, len(tables.peak)), pa.list_(pa.string())),
    }
    columns |= _logit_columns(logits, len(tables.peak), decoder)
    write_table(folder / "latents.parquet", pa.table(columns))


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
    parts = []
    for name, role in names:
        rows = [i for i, d in enumerate(documents) if (str(d[unit]), str(d["role"])) == (name, role)]
        part = {
            "latent": pa.array(alive, pa.int32()),
            "unit": pa.array([name] * len(alive), pa.string()),
            "role": pa.array([role] * len(alive), pa.string()),
            "n_documents": pa.array([len(rows)] * len(alive), pa.int32()),
            "n_tokens": pa.array([int(tables.document_tokens[rows].sum())] * len(alive), pa.int64()),
            "mean": tables.document_means[rows][:, alive].mean(axis=0),
            "density": shares[rows][:, alive].mean(axis=0),
        }
        parts.append(pa.table(part))
    write_table(folder / "units.parquet", pa.concat_tables(parts).sort_by([("latent", "ascending")]))


_EXAMPLES = pa.schema(
    [
        ("latent", pa.int32()),
        ("rank", pa.int32()),
        ("window", pa.int32()),
        ("position", pa.int32()),
        ("activation", pa.float32()),
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
    for rank, window in enumerate(tables.top_window[latent].tolist()):
        if window < 0:
            return
        position = int(tables.top_position[latent, rank])
        passage = decoder.passage(corpus.ids(window), position)
        # heat is centred on the token; the passage may begin or end inside it
        skip = BEFORE - (position - passage.first)
        heat = tables.top_heat[latent, rank, skip : skip + len(passage.pieces)]
        document = corpus.documents[corpus.document_of_window[window]]
        start, end = corpus.characters(window, passage.first, len(passage.pieces))
        yield {
            "latent": latent,
            "rank": rank,
            "window": window,
            "position": position,
            "activation": float(tables.top_activation[latent, rank]),
            **{name: document.get(name) for name in _FROM_DOCUMENT},
            "char_start": start,
            "char_end": end,
            "before": passage.before,
            "token": passage.token,
            "after": passage.after,
            "pieces": passage.pieces,
            "heat": heat.tolist(),
        }


def _top_tokens(examples: pa.Table, n_latents: int) -> list[list[str]]:
    """The tokens on which each latent's examples peak, the most frequent first."""
    found: list[Counter[str]] = [Counter() for _ in range(n_latents)]
    for latent, token in zip(examples["latent"].to_pylist(), examples["token"].to_pylist(), strict=True):
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
    return columns
