"""Windows for other programs: `pt`, `datasets`, `parquet`, one file (or folder) a source.

Only full windows are exported, so that every row has the same length without padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ..store.files import make_dir, sha256_bytes
from ..store.tables import write_table
from .windows import TokenStore

__all__ = ["EXPORTS", "export"]

EXPORTS = ("pt", "datasets", "parquet")
_ENDINGS = {"pt": ".pt", "parquet": ".parquet", "datasets": ""}


def export(store: TokenStore, folder: Path, forms: Sequence[str], names: Mapping[str, str]) -> list[Path]:
    """Write the windows of each source.

    Args:
        forms: of `pt` ({"input_ids": long [n, window], "meta": dict}), `parquet` (one row a window, for
            `datasets.load_dataset`) and `datasets` (a folder that `datasets.load_from_disk` opens).
        names: source id -> file stem; another source is named by its id.
    """
    make_dir(folder)
    written = []
    owner = np.asarray(store.windows["document"], dtype=np.int64)
    full = (store.length == store.window).numpy()
    sources = np.array([document["source_id"] for document in store.documents])
    for source in dict.fromkeys(sources.tolist()):
        rows = np.flatnonzero((sources == source)[owner] & full)
        ids = store.input_ids[torch.from_numpy(rows)]
        first = next(d for d in store.documents if d["source_id"] == source)
        meta = {**first, "window": store.window, "tokenizer": store.tokenizer["name"]}
        for form in forms:
            path = folder / (names.get(source, source) + _ENDINGS[form])
            _WRITERS[form](path, ids, meta)
            written.append(path)
    return written


def _write_pt(path: Path, ids: torch.Tensor, meta: dict) -> None:
    torch.save({"input_ids": ids.long(), "meta": meta}, path)


def _write_parquet(path: Path, ids: torch.Tensor, meta: dict) -> None:
    write_table(path, _table(ids, {key: [value] * len(ids) for key, value in meta.items()}))


def _write_datasets(path: Path, ids: torch.Tensor, meta: dict) -> None:
    from datasets import Dataset

    rows = Dataset(_table(ids, {}))
    rows.info.description = json.dumps(meta, ensure_ascii=False, sort_keys=True)
    mark = sha256_bytes(ids.numpy().tobytes())[:16]  # the fingerprint is random unless given, and is written to disk
    Dataset(rows.data, info=rows.info, fingerprint=mark).save_to_disk(str(path))


def _table(ids: torch.Tensor, more: Mapping[str, list]) -> pa.Table:
    rows = pa.FixedSizeListArray.from_arrays(pa.array(ids.numpy().ravel()), ids.shape[1])
    return pa.table({"input_ids": rows, **more})


_WRITERS = {"pt": _write_pt, "parquet": _write_parquet, "datasets": _write_datasets}
