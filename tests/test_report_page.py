"""The page itself: inert, deterministic, self-contained, whatever the corpus says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from greatctl.report.charts import heat_map, lines
from greatctl.report.page import cell, render
from greatctl.report.view import Example, Latent, Prose, Section, Table, View

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
    latent = Latent(7, words, words, [(words, words), ("x", float("nan"))], [words], [words],
                    [Example([words, "b"], [1.0, 0.0], 2.5, words)], [(words, words, 1.0)])  # fmt: skip
    blocks = [
        Prose(words),
        Table([words, "n"], [[words, 1.5], [words, None], [words, float("inf")]], numeric=[1], caption=words),
        lines(words, [0, 1], {words: [1.0, float("nan")]}, x_title=words, words=words),
        heat_map(words, [words], [0], [[None]], [[words]], words=words),
        latent,
    ]
    return View(words, words, [words], [Section("a", words, blocks)])


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
def test_hostile_text_adds_no_element_handler_link_or_script(words: str) -> None:
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


def test_figures_are_strict_json_and_the_same_view_gives_the_same_bytes() -> None:
    html = render(_view("x"))
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)
    assert data is not None

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(data[1], parse_constant=refuse)
    assert html == render(_view("x"))


def test_what_is_missing_is_said() -> None:
    assert cell(None) == cell(float("nan")) == cell(float("inf")) == "not available"
    assert cell(0.12345) == "0.123" and cell(12345) == "12,345" and cell(True) == "yes"
    json.dumps(_view("x").to_json(), allow_nan=False)


def test_a_report_without_charts_carries_no_plotly() -> None:
    html = render(View("t", "s", [], [Section("a", "A", [Prose("only words")])]))
    assert len(html) < 40_000
