"""The report over tables: thousands of latents within its bytes, and what is missing named."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from greatctl.errors import PluginError
from greatctl.extend.sections import MOST, check_sections
from greatctl.report import explore
from greatctl.report.collect import Parts, view
from greatctl.report.markdown import markdown
from greatctl.report.page import render
from greatctl.report.view import Hypothesis, Index, Latent
from greatctl.store.artifact import Artifact

LIMIT = 12_000_000
ROOT = Path(__file__).resolve().parents[1]
PIECES = [" the", " greatness", " of", " “Washington”", " and", "</script>", " é", " house"] * 4


def _lists(count: int, each: list) -> pa.Array:
    """`count` equal lists without a Python object each."""
    offsets = np.arange(count + 1, dtype=np.int32) * len(each)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(each * count))


def _features(folder: Path, count: int) -> Artifact:
    """The tables of `interpret` for so many latents, as large as they come."""
    folder.mkdir()
    latent = pa.array(np.arange(count, dtype=np.int32))
    heat = [i / 32 for i in range(32)]
    numbers = {name: np.linspace(0.001, 0.9, count) for name in ("density", "max", "mean_when_firing", "token_share")}
    words = {name: _lists(count, PIECES[:5]) for name in ("top_tokens", "top_logit_tokens", "bottom_logit_tokens")}
    pq.write_table(pa.table({"latent": latent, **numbers, **words}), folder / "latents.parquet")
    read = min(count, 5000)  # the strongest are the first, and no page has room for more passages
    two = pa.array(np.repeat(np.arange(read, dtype=np.int32), 2))
    place = {"kind": "top", "work": "A work with a name of usual length", "author": "An Author", "source_id": "a-work"}
    same = {name: [value] * (2 * read) for name, value in place.items()}
    pq.write_table(
        pa.table({"latent": two, **same, "activation": np.full(2 * read, 12.5), "pieces": _lists(2 * read, PIECES),
                  "heat": _lists(2 * read, heat)}), folder / "examples.parquet",
    )  # fmt: skip
    judged = {"effect": np.linspace(2, -1, count), "auroc": np.full(count, 0.5123), "q_value": np.full(count, 0.5)}
    verdict = pa.array(["not-supported"]).take(pa.array(np.zeros(count, dtype=np.int32)))
    concept = pa.array(["greatness"]).take(pa.array(np.zeros(count, dtype=np.int32)))
    contrasts = pa.table({"concept": concept, "latent": latent, **judged, "verdict": verdict})
    pq.write_table(contrasts, folder / "contrasts.parquet")
    pq.write_table(contrasts.slice(0, 64), folder / "hypotheses.parquet")
    record = {"fingerprint": "e" * 64, "stage": "interpret", "config": {}, "inputs": {}, "outputs": [], "versions": {}}
    return Artifact(folder, record, {"summary": {}})


def _index(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="index">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize(("count", "listed"), [(2_000, 2_000), (100_000, explore.ROWS)])
def test_a_page_stays_below_twelve_megabytes_and_says_what_it_leaves_out(
    tmp_path: Path, count: int, listed: int
) -> None:
    parts = Parts(features=_features(tmp_path / "features", count))
    made = view(parts, plugin_sections=[], root=tmp_path, latents=48, rules="rules")
    html = render(made)
    assert len(html.encode()) < LIMIT - 4_900_000  # this page has no chart, and so no plotly
    index = _index(html)
    assert len(index["columns"]["latent"]) == listed
    assert index["columns"]["latent"][:64] == list(range(64)) and index["pages"][0]["p"][0][0] == PIECES
    block = next(b for s in made.sections for b in s.blocks if isinstance(b, Index))
    assert block.n_all == count and f"{listed:,} of {count:,} latents" in block.words
    assert (f"{count - listed:,} are left out" in block.words) == (listed < count)
    without = sum(page is None for page in index["pages"])
    assert without == listed - block.n_pages and (f"for {without:,} of them" in block.words) == (without > 0)
    if count == 2_000:
        assert without == 0


def test_tables_that_are_missing_are_named_and_not_made_up(tmp_path: Path) -> None:
    made = view(
        Parts(features=_features(tmp_path / "features", 80)), plugin_sections=[], root=tmp_path, latents=4, rules=""
    )
    blocks = [b for s in made.sections for b in s.blocks]
    card = next(b for b in blocks if isinstance(b, Hypothesis))
    assert card.gate == [] and card.rivals == [] and card.value is None and card.doses == []
    html = render(made)
    for words in ("No baseline was measured", "The checks were not run", "No labels were written", "is not made yet"):
        assert words in html
    assert sum(isinstance(b, Latent) for b in blocks) == 4
    json.dumps(made.to_json(), allow_nan=False)


def test_a_card_has_its_baselines_checks_and_doses_beside_the_number(tmp_path: Path) -> None:
    features = _features(tmp_path / "features", 80)
    tables = {
        "evidence": [{"concept": "greatness", "latent": 0, "check": 5, "name": "random baselines", "state": "failed",
                      "value": 0.1, "reason": "as good"}],
        "baselines": [{"concept": "greatness", "baseline": "character n-grams", "bar": 0.93, "missing": None},
                      {"concept": "greatness", "baseline": "SAEs of other seeds", "bar": None, "missing": "not trained"}],
        "causal": [{"concept": "greatness", "latent": latent, "kind": kind, "strength": 0.5, "draw": draw, "pair": "a",
                    "effect": effect, "damage_ce": 0.25}
                   for latent, kind, draw, effect in [(0, "steer", 0, 3.0), *((-1, "random", n, n - 1.0) for n in range(3))]],
    }  # fmt: skip
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), features.path / f"{name}.parquet")
    made = view(Parts(features=features), plugin_sections=[], root=tmp_path, latents=4, rules="")
    card = next(b for s in made.sections for b in s.blocks if isinstance(b, Hypothesis))
    assert [(r.name, r.value) for r in card.rivals] == [("character n-grams", 0.93), ("SAEs of other seeds", None)]
    assert [(c.number, c.state) for c in card.gate] == [(5, "failed")]
    (kind, strength, effect, low, high, damage) = card.doses[0]
    assert (kind, strength, effect, damage) == ("added along its row", 0.5, 3.0, 0.25) and -1 <= low < 0 < high <= 1
    page = next(b for s in made.sections for b in s.blocks if isinstance(b, Latent))
    assert page.label is None and page.name == card.name == "the · greatness · of"


SCORES = {
    "detection": 0.9,
    "detection_shuffled": 0.5,
    "fuzzing": 0.8,
    "fuzzing_shuffled": 0.6,
    "n_detection": 20,
    "n_fuzzing": 10,
}
LABELS: list[dict] = [
    {"latent": 0, "name": "<b>courage</b>", "description": "fires on courage", **SCORES},
    {"latent": 1, "name": "worthless", **SCORES, "detection": 0.5, "fuzzing": 0.4},
    {"latent": 2, "name": "half", **SCORES, "fuzzing": 0.6},
    {"latent": 3, "name": "alone", **SCORES, "detection_shuffled": None, "fuzzing_shuffled": None},
    {"latent": 4, "name": "unscored"},
    {"latent": 5, "name": "fires on 'x'", "source": "fallback", "problem": "3 answers could not be read"},
    {"latent": 6, "name": "by luck", **SCORES, "detection_low": 0.5, "fuzzing_low": 0.45},
]


def _labels(folder: Path, rows: list[dict] = LABELS) -> Artifact:
    folder.mkdir()
    same = {"source": "labeler", "labeler": "m at http://127.0.0.1", "shuffled_with": 9, "split": "works"}
    names = sorted({name for row in rows for name in row} | same.keys())
    table = [{name: {**same, **row}.get(name) for name in names} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "labels.parquet")
    record = {
        "fingerprint": "a" * 64,
        "stage": "interpret --labeler",
        "config": {},
        "inputs": {},
        "outputs": [],
        "versions": {},
    }
    means = {"detection": 0.8, "detection_shuffled": 0.5, "detection_gain": [0.3, 0.2, 0.4], "fuzzing": None}
    return Artifact(
        folder, record, {"summary": {"labeler": "m", "n_latents": len(rows), "n_named": len(rows) - 1, **means}}
    )


def test_a_label_stands_with_its_scores_beside_anothers_and_one_that_says_nothing_is_called_so(tmp_path: Path) -> None:
    features, labels = _features(tmp_path / "features", 80), _labels(tmp_path / "labels")
    made = view(Parts(features=features, labels=labels), plugin_sections=[], root=tmp_path, latents=8, rules="")
    blocks = [b for s in made.sections for b in s.blocks]
    pages = {b.latent: b for b in blocks if isinstance(b, Latent)}
    cards = {b.latent: b for b in blocks if isinstance(b, Hypothesis)}
    found = {latent: page.label for latent, page in pages.items() if page.label}
    assert {n: label.holds for n, label in found.items()} == {
        0: True,
        1: False,
        2: True,
        **dict.fromkeys((3, 4, 5, 6), False),
    }
    tokens = "the · greatness · of"
    assert [pages[n].name for n in range(8)] == ["<b>courage</b>", tokens, "half", *[tokens] * 5]
    assert cards[0].name == "<b>courage</b>" and cards[1].name == tokens and cards[0].label == found[0]
    assert found[0].doubt == "" and found[5].name == "" and "3 answers could not be read" in found[5].doubt
    words = {
        1: "says nothing of this latent",
        2: "In fuzzing",
        3: "no other latent's label",
        4: "not scored",
        6: "guessing",
    }
    assert all(said in found[n].doubt for n, said in words.items())
    html, text = render(made), markdown(made)
    assert "<b>courage" not in html and "0.50 with the label of latent 9" in html and "no part of any verdict" in text
    assert "detection 0.80 (another latent&#39;s label 0.50; +0.30, 95 % +0.20 to +0.40), fuzzing not available" in html
    assert "4 did no better than that or than guessing" in html and text.count("says nothing of this latent") == 3
    assert any(record.stage == "interpret --labeler" for record in made.records.values())


def test_labels_can_be_searched_and_sorted_and_have_their_place_in_the_bytes(tmp_path: Path) -> None:
    many = [{"latent": n, "name": "ab", "description": "c" * 600, **SCORES} for n in range(5000, 5600)]
    parts = Parts(features=_features(tmp_path / "features", 6000), labels=_labels(tmp_path / "labels", many))
    html = render(view(parts, plugin_sections=[], root=tmp_path, latents=4, rules=""))
    index = _index(html)
    assert index["columns"]["latent"][4:8] == [5000, 5001, 5002, 5003] and len(index["labels"]) == 600
    assert index["columns"]["detection"][3:5] == [None, [0.9, 0.5]] and index["columns"]["label"][4] == "ab"
    assert index["labels"]["5000"]["description"] == "c" * 600
    assert len(html.encode()) < LIMIT - 4_900_000


def test_the_example_plugin_gives_a_section_in_twenty_five_lines(tmp_path: Path) -> None:
    path = ROOT / "plugins" / "verdicts.py"
    assert len(path.read_text().splitlines()) <= 25
    spec = importlib.util.spec_from_file_location("verdicts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "features").mkdir()
    features = _features(tmp_path / "features" / "mine", 80)
    (section,) = check_sections(module.report_sections(tmp_path))
    given = [{**section, "plugin": "verdicts"}]
    html = render(view(Parts(features=features), plugin_sections=given, root=tmp_path, latents=4, rules=""))
    assert (
        "Verdicts at a glance" in html and '<td class="num" data-value="64">64</td>' in html and 'id="chart-0"' in html
    )


def test_numbers_of_a_plugin_that_are_not_finite_become_missing() -> None:
    table = {"kind": "table", "columns": ["a", "b"], "rows": [[float("nan"), 1.5], [float("inf"), True]]}
    (section,) = check_sections([{"title": "T", "blocks": [table]}])
    assert section["blocks"] == [{**table, "rows": [[None, 1.5], [None, True]]}]


AXIS = {"name": "x", "unit": ""}
BARS = {"kind": "chart", "draw": "bars", "title": "T", "words": "W", "x": AXIS, "y": AXIS, "series": {"a": [["b", 1]]}}
HEAT = {
    "kind": "chart",
    "draw": "heat",
    "title": "T",
    "words": "W",
    "x": AXIS,
    "y": AXIS,
    "value": AXIS,
    "cells": [[0, 1, 2.0]],
}


def test_a_chart_of_a_plugin_keeps_its_form_and_loses_what_json_does_not_have() -> None:
    nan = float("nan")
    bars, heat = {**BARS, "series": {"a": [["b", nan], ["c", 2]]}}, {**HEAT, "cells": [[0, 1, -nan], [0, 2, 1]]}
    (section,) = check_sections([{"title": "T", "blocks": [bars, heat]}])
    assert section["blocks"] == [
        {**BARS, "series": {"a": [["b", None], ["c", 2]]}},
        {**HEAT, "cells": [[0, 1, None], [0, 2, 1]]},
    ]


@pytest.mark.parametrize(
    "block",
    [
        {**BARS, "kind": "bars"},
        {**BARS, "draw": "pie"},
        {**BARS, "draw": "heat"},
        {**BARS, "html": "<b>"},
        {**BARS, "title": 3},
        {**BARS, "x": "x"},
        {**BARS, "y": {"name": "y", "unit": None}},
        {**BARS, "series": [["b", 1]]},
        {**BARS, "series": {"a": [["b", "1"]]}},
        {**BARS, "series": {"a": [["b", True]]}},
        {**BARS, "series": {"a": [["b", 1]], "c": [[2, 1]]}},
        {**BARS, "series": {"a": [[float("inf"), 1]]}},
        {**BARS, "series": {"a": [[n, 1] for n in range(MOST + 1)]}},
        {**HEAT, "cells": [[0, 1, 2], [0, 1, 3]]},
        {**HEAT, "cells": [[0, "a", 2], [0, 1, 3]]},
        {**HEAT, "cells": [[0, 1]]},
    ],
)
def test_a_chart_that_is_off_is_refused(block: dict) -> None:
    with pytest.raises(PluginError):
        check_sections([{"title": "T", "blocks": [block]}])
