"""A view becomes one HTML file.

Self-contained: style, script, plotly and data are inside. Strict: Jinja2 escapes everything, data goes in as JSON that
cannot close its script element, and a content security policy allows no request at all and only the scripts whose hashes
it names. Plotly takes longest to start and lies there as text until the first chart comes into view, so that search,
sorting and folding work at once; without any script all words, tables, cards and drawings are there. Deterministic: the
same view gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from .values import clean, seen
from .view import Cell, Chart, Index, Label, View

__all__ = ["render"]

_TEMPLATES = Path(__file__).parent / "templates"
_JSON = {"sort_keys": True, "ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
_INDEX = ("columns", "judged", "pages", "units", "places", "labels")
_NAMES = {"latent", "neighbour", "layer", "year"}  # columns whose whole numbers are names, not amounts


def render(view: View) -> str:
    """The whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_seen,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = _JSON
    environment.filters.update(cell=cell, objid=id, shown=shown, points=points, runs=runs, coded=coded)
    style, script, plotly = _asset("report.css"), _asset("report.js"), _plotly()
    charts = [c for s in view.sections for c in s.blocks if isinstance(c, Chart)]
    figures = seen(clean([{"data": list(c.data), "layout": dict(c.layout)} for c in charts]))
    found = [b for s in view.sections for b in s.blocks if isinstance(b, Index)]
    index = seen(clean({name: _plain(getattr(found[0], name)) for name in _INDEX})) if found else None
    return environment.get_template("report.html").render(
        view=view,
        numbers={id(c): n for n, c in enumerate(charts)},
        figures=figures,
        index=index,
        records=view.records,
        names=_NAMES,
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(plotly) if charts else "",
        policy=_policy([script, *([plotly] if charts else [])]),
    )


def cell(value: Cell, digits: int = 3, *, name: bool = False) -> str:
    """A table cell for people: numbers short, what is missing said so; a whole number that is a `name` stays as it is."""
    if value is None:
        return "not available"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if name else f"{value:,}"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return "not available"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return value


def shown(token: str) -> str:
    """A token as one can read it in a line: a line break as a return sign."""
    return token.replace("\n", "\u21b5")


def coded(text: str) -> Markup:
    """A paragraph in which what stands between two backticks is code; all of it escaped."""
    parts = str(seen(text)).split("`")
    if len(parts) % 2 == 0:  # a backtick of somebody's text
        return escape("`".join(parts))
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(part) if at % 2 else escape(part) for at, part in enumerate(parts))


def points(heights: Sequence[float | None], width: int, height: int) -> list[str]:
    """The lines of a small curve as SVG points, left to right; a gap where nothing was measured."""
    step = width / max(len(heights) - 1, 1)
    lines: list[list[str]] = [[]]
    for number, value in enumerate(heights):
        if value is None:
            lines.append([])
        else:
            lines[-1].append(f"{number * step:.1f},{height * (1 - value):.1f}")
    return [" ".join(line) for line in lines if line]


def runs(tokens: Sequence[str], strengths: Sequence[float]) -> list[tuple[str, float]]:
    """Tokens with their heat, quiet neighbours joined: fewer elements, the same passage."""
    joined: list[tuple[str, float]] = []
    for token, strength in zip(tokens, strengths, strict=True):
        heat = strength if strength > 0.02 else 0.0
        if joined and not heat and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + token, 0.0)
        else:
            joined.append((token, heat))
    return joined


def _seen(value: object) -> object:
    """What a template puts out, with characters that would act written out; markup of our own stays as it is."""
    return value if isinstance(value, Markup) else seen(value)


def _plain(value: object) -> object:
    """Data classes as mappings, which JSON knows."""
    if isinstance(value, Mapping):
        return {key: asdict(one) if isinstance(one, Label) else one for key, one in value.items()}
    return value


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
