"""The page itself: inert, deterministic, self-contained, whatever the corpus says."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest

from greatctl.report.charts import heat_map, lines
from greatctl.report.markdown import markdown
from greatctl.report.page import cell, render
from greatctl.report.sections import of_plugins
from greatctl.report.values import dumps
from greatctl.report.view import (
    Curve,
    Example,
    Facet,
    Finding,
    Gate,
    Hypothesis,
    Index,
    Label,
    Latent,
    Origin,
    Prose,
    Record,
    Rival,
    Score,
    Section,
    Share,
    Table,
    View,
)

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "{{7*7}}",
    "&#x0;",
    "'\"`",
    "line\u2028separator",
    "]]>",
    "<svg><script>alert(1)</script></svg>",
    "<!--",
    "\x00\x1b[31m\u202e",
]


def _view(words: str) -> View:
    origin = Origin("f" * 64, words)
    passage = Example([words, "b"], [1.0, 0.0], 2.5, words)
    label = Label(words, words, words, [Score("detection", 0.7, 0.6, 0.8, 0.5, 20)], 8, words, True, words, origin)
    facets = [Facet(words, words, [Share(words, words, 1.0, 0.5, 1.5, words)])]
    curves = Curve(words, [0.1, None], words), [Curve(words, [0.5, 1.0], words)]
    latent = Latent(7, words, [(words, words)], words, [(words, words), ("x", float("nan"))], [words], [words], [passage],
                    facets, *curves, [(words, [passage])], [(words, [(3, 0.5)])], label, True, origin)  # fmt: skip
    hypothesis = Hypothesis(words, 7, words, words, words, words, words, [(words, 1.0)], 0.7, 0.5, 0.9,
                            [Rival(words, 0.9, words)], [Gate(1, words, words, words)],
                            [[words, 1.0, None, 0.1, 0.2, 0.3]], label, origin=origin)  # fmt: skip
    pages = [{"p": [[[words], "9", 1.0, 0]], "u": [[0, 1.0]]}]
    columns = {"latent": [7], "density": [0.1], "max": [float("nan")], "tokens": [[words]], "up": [[words]],
               "down": [[words]], "label": [words], "detection": [[0.7, 0.5]]}  # fmt: skip
    index = Index(columns, {words: {"verdict": [words], "effect": [1.0]}}, pages, [[words, words]], [words], 1, 1, words,
                  {7: label}, origin)  # fmt: skip
    record = Record(
        words, words, "f" * 64, [(words, words)], [(words, words, words)], [(words, words)], [(words, 1, words)]
    )
    blocks = [
        Prose(words, title=words),
        Prose(words, summary=words),
        Table([words, "n"], [[words, 1.5], [words, None], [words, float("inf")]], numeric=[1], caption=words),
        lines(words, [0, 1], {words: [1.0, float("nan")]}, x_title=words, words=words),
        heat_map(words, [words], [words], [[None]], [[words]], words=words, p_values=[[None]], tags={"run": words}),
        hypothesis,
        latent,
        index,
        record,
        *of_plugins([{"title": words, "blocks": [_plugin_chart("bars", words), _plugin_chart("heat", words)]}])[
            0
        ].blocks,
    ]
    return View(words, words, [Finding(words, "a", origin)], [Section("a", words, blocks)])


def _plugin_chart(draw: str, words: str) -> dict[str, object]:
    axis = {"name": words, "unit": words}
    chart = {"kind": "chart", "draw": draw, "title": words, "words": words, "x": axis, "y": axis}
    if draw == "heat":
        return {**chart, "value": axis, "cells": [[words, words, 1.5], [words, "b", None]]}
    return {**chart, "series": {words: [[words, 1.5], ["b", None]]}}


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_script = tag == "script"
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)


def _seen(html: str) -> _Seen:
    seen = _Seen()
    seen.feed(html)
    return seen


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_text_adds_no_element_handler_link_or_script(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greatctl.report.page._plotly", lambda: "plotly")  # megabytes that no word of ours is in
    calm, hostile = _seen(render(_view("calm words"))), _seen(render(_view(words)))
    assert hostile.tags == calm.tags
    assert hostile.handlers == []
    assert all(link.startswith("#") for link in hostile.links)
    assert "49" not in re.findall(r"<p>(.*?)</p>", render(_view("{{7*7}}")))


def test_the_policy_allows_no_request_and_only_our_scripts() -> None:
    html = render(_view("x"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert (
        "unsafe-eval" not in policy[1] and "script-src &#39;unsafe-inline" not in policy[1] and "http" not in policy[1]
    )
    assert policy[1].count("sha256-") == 2
    hashes = set(re.findall(r"sha256-([^&]*)&#39;", policy[1]))
    scripts = re.findall(r'<script(?: type="text/plain" id="plotly")?>(.*?)</script>', html, re.S)
    assert {b64encode(sha256(text.encode()).digest()).decode() for text in scripts} == hashes


def test_figures_are_strict_json_and_the_same_view_gives_the_same_bytes() -> None:
    html = render(_view("x"))
    found = re.findall(r'<script type="application/json" id="(figures|index)">(.*?)</script>', html, re.S)
    assert [name for name, _ in found] == ["figures", "index"]

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for _, data in found:
        json.loads(data, parse_constant=refuse)
    assert html == render(_view("x")) and markdown(_view("x")) == markdown(_view("x"))


@pytest.mark.parametrize("words", HOSTILE)
def test_markdown_holds_hostile_text_without_markup_or_control_characters(words: str) -> None:
    text = markdown(_view(words))
    assert not re.search(r"(?<!\\)[<>]", re.sub(r"^> ?", "", text, flags=re.M))
    assert all(c.isprintable() or c == "\n" for c in text)
    pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")}
    assert pipes == {
        len(re.findall(r"(?<!\\)\|", line)) for line in markdown(_view("x")).splitlines() if line[:2] == "| "
    }


def test_a_number_leads_to_its_artifact_and_settings_are_whole() -> None:
    view = _view("w" * 900)
    html = render(view)
    assert html.count('href="#a-ffffffffffff"') >= 4 and 'id="a-ffffffffffff"' in html
    assert f"<code>{'w' * 900}</code>" in html


def test_rows_of_a_map_of_layer_windows_are_named_by_the_window() -> None:
    chart = heat_map("t", ["a"], ["0-2", "1-3"], [[0.1], [0.2]], [["h"], ["h"]], words="w")
    assert chart.layout["yaxis"]["ticktext"] == ["0-2", "1-3"] and chart.data[0]["y"] == [0, 1]


def test_what_is_missing_is_said() -> None:
    assert cell(None) == cell(float("nan")) == cell(float("inf")) == "not available"
    assert cell(0.12345) == "0.123" and cell(12345) == "12,345" and cell(True) == "yes"
    assert cell(2.9189, 4) == "2.919" and cell(1533, name=True) == "1533"
    json.dumps(_view("x").to_json(), allow_nan=False)


def test_a_report_without_charts_carries_no_plotly() -> None:
    html = render(View("t", "s", [], [Section("a", "A", [Prose("only words")])]))
    assert len(html) < 40_000


def test_markdown_makes_no_link_list_or_heading_of_foreign_text() -> None:
    words = ["http://a.example", "www.a.example", "# head", "- item", "1. item", "[a](b)", "a|b", "*b*"]
    view = View("t", "s", [], [Section("a", "A", [Prose(text) for text in words])])
    text = markdown(view).split("## A\n\n")[1].split("\n\n")
    assert [line.strip() for line in text] == [
        "http:\\//a.example", "www\\.a.example", "\\# head", "\\- item", "1\\. item", "\\[a\\](b)", "a\\|b", "\\*b\\*",
    ]  # fmt: skip


ACTING = "a\x1b]8;;file:///x\x07b\u202egnp.exe\x9b31m"


def test_characters_that_act_are_written_out_in_the_page_and_kept_harmless_in_the_data() -> None:
    view = _view(ACTING)
    for text in (render(view), markdown(view), dumps(view.to_json())):
        body = text.split('<script type="text/plain" id="plotly">')[0]  # what plotly says is its own
        assert not any(character in body for character in "\x1b\x07\x9b\u202e")
    assert "a\\x1b]8;;file:///x\\x07b\\u202egnp.exe\\x9b31m" in render(view)
    assert json.loads(dumps(view.to_json()))["title"] == ACTING


def test_a_chart_of_a_plugin_is_drawn_and_its_numbers_stand_in_text_and_data() -> None:
    heat = {**_plugin_chart("heat", "w"), "cells": [[-1, 0, 0.5], [-1, 1, -2.0], [0, 1, None]]}
    bars = {**_plugin_chart("bars", "w"), "series": {"one": [["1984", 3], ["<b>", None]], "two": [["1984", 4]]}}
    (section,) = of_plugins([{"title": "T", "blocks": [bars, heat], "plugin": "p"}])
    drawn, map_, _ = section.blocks
    assert drawn.layout["xaxis"]["type"] == "category" and drawn.layout["showlegend"]  # type: ignore[union-attr,index]
    assert [trace["x"] for trace in drawn.data] == [["1984", "&lt;b>"], ["1984"]]  # type: ignore[union-attr]
    assert map_.data[0]["z"] == [[0.5, None], [-2.0, None]] and map_.data[0]["zmax"] == 2.0  # type: ignore[union-attr]
    view = View("t", "s", [], [section])
    text = markdown(view)
    assert "| one | 1984 | 3 |" in text and "| -1 | 1 | -2 |" in text and "| 0 | 1 | not available |" in text
    assert view.to_json()["sections"][0]["blocks"][1]["numbers"]["rows"][1] == [-1, 1, -2.0]
