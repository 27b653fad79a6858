"""Example plugin: a section of the report that draws how many candidates got which verdict (--plugin plugins/verdicts.py)."""

from pathlib import Path

import pyarrow.parquet as pq

from greatctl import hookimpl

__version__ = "1.1"


@hookimpl
def report_sections(results: Path) -> list[dict[str, object]]:
    """A chart for every set of features: a bar for each verdict and concept."""
    charts: list[dict[str, object]] = []
    for path in sorted((results / "features").glob("*/hypotheses.parquet")):
        series: dict[str, list] = {}
        counts = pq.read_table(path).group_by(["concept", "verdict"]).aggregate([([], "count_all")])
        for row in counts.sort_by("verdict").to_pylist():
            series.setdefault(row["concept"], []).append([row["verdict"], row["count_all"]])
        chart = {"kind": "chart", "draw": "bars", "title": path.parent.name, "words": "Candidates by verdict."}
        axes = {"x": {"name": "verdict", "unit": ""}, "y": {"name": "candidates", "unit": ""}}
        charts.append({**chart, **axes, "series": series})
    return [{"title": "Verdicts at a glance", "blocks": charts}]
