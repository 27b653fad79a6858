"""Example plugin: a section of the report that counts verdicts by concept, as data. Use it with --plugin plugins/verdicts.py"""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from greatctl import hookimpl

__version__ = "1.0"


@hookimpl
def report_sections(results: Path) -> list[dict[str, object]]:
    """One table: a row for each set of features, concept and verdict."""
    rows = []
    for path in sorted((results / "features").glob("*/hypotheses.parquet")):
        table = pq.read_table(path, columns=["concept", "verdict"]).to_pylist()
        counts = Counter((row["concept"], row["verdict"]) for row in table)
        rows += [[path.parent.name, *key, n] for key, n in sorted(counts.items())]
    words = "How the candidates of each concept fared, in every set of features of this project."
    table = {"kind": "table", "columns": ["features", "concept", "verdict", "candidates"], "rows": rows}
    return [{"title": "Verdicts at a glance", "blocks": [{"kind": "prose", "text": words}, table]}]
