"""A view becomes one HTML file.

Self-contained: style, script, plotly and data are inside. Strict: Jinja2 escapes everything, data goes in as JSON that
cannot close its script element, and a content security policy allows no request at all and only the scripts whose hashes
it names. Deterministic: the same view gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from .view import Cell, Chart, View, clean

__all__ = ["render"]

_TEMPLATES = Path(__file__).parent / "templates"


def render(view: View) -> str:
    """The whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=cell, objid=id, shown=shown)
    style, script, plotly = _asset("report.css"), _asset("report.js"), _plotly()
    charts = [c for s in view.sections for c in s.blocks if isinstance(c, Chart)]
    figures = clean([{"data": list(c.data), "layout": dict(c.layout)} for c in charts])
    return environment.get_template("report.html").render(
        view=view,
        numbers={id(c): n for n, c in enumerate(charts)},
        figures=figures,
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(plotly) if charts else "",
        policy=_policy([script, *([plotly] if charts else [])]),
    )


def cell(value: Cell) -> str:
    """A table cell for people: numbers short, what is missing said so."""
    if value is None:
        return "not available"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return "not available"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return value


def shown(token: str) -> str:
    """A token as one can read it in a line: a line break as a return sign."""
    return token.replace("\n", "\u21b5")


def _policy(scripts: list[str]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "font-src data:; base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """plotly.js, with nothing in it that could end its script element."""
    return get_plotlyjs().replace("</script", "<\\/script")
