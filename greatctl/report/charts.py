"""Plotly figures as plain data. Colours come from the page, so that light and dark both work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .view import Chart

__all__ = ["bars", "drawn", "heat_map", "lines", "points"]

_LINES = ("#c2571a", "#2f6db5", "#4a8c4a", "#8a5bb0", "#b0893a", "#4d8f99")
_AXIS = {"gridcolor": "rgba(128,128,128,0.22)", "zerolinecolor": "rgba(128,128,128,0.5)"}
# From cold through paper to warm; the middle is transparent, so that an empty cell is the page itself.
_DIVERGING = [[0.0, "#2f6db5"], [0.5, "rgba(128,128,128,0.06)"], [1.0, "#c2571a"]]


def _plain(text: object) -> str:
    """Text that plotly shows as it is: it reads tags in labels, and corpus tokens may look like tags."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;")


def _named(title: str) -> dict[str, object]:
    """An axis with its title, and room for both."""
    return {"title": {"text": _plain(title), "standoff": 8}, "automargin": True}


def _lines_of(text: str) -> str:
    """Plain text for plotly, its line breaks kept."""
    return _plain(text).replace("\n", "<br>")


def _layout(**more: object) -> dict[str, object]:
    base = {
        "margin": {"l": 56, "r": 16, "t": 12, "b": 52},
        "height": 320,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "legend": {"orientation": "h", "y": 1.12},
        "autosize": True,
        "template": {"layout": {"xaxis": _AXIS, "yaxis": _AXIS}},
    }
    return {**base, **more}


def lines(title: str, x: Sequence[float], series: Mapping[str, Sequence[float]], *, x_title: str, words: str) -> Chart:
    """Curves over a shared x; a name that ends in "*" goes on the right-hand axis."""
    data = []
    for number, (name, y) in enumerate(series.items()):
        trace = {
            "type": "scatter",
            "mode": "lines",
            "name": _plain(name.rstrip("*")),
            "x": list(x),
            "y": list(y),
            "line": {"color": _LINES[number % len(_LINES)], "width": 2},
        }
        data.append({**trace, "yaxis": "y2"} if name.endswith("*") else trace)
    axes = {"xaxis": _named(x_title), "yaxis": {"rangemode": "tozero"}}
    room = {"l": 56, "r": 48, "t": 12, "b": 52}  # the right-hand numbers need some
    other = {"overlaying": "y", "side": "right", "rangemode": "tozero", "showgrid": False, "tickmode": "auto"}
    right = {"margin": room, "yaxis2": other}
    return Chart(title, data, _layout(**axes, **(right if any(n.endswith("*") for n in series) else {})), words)


def bars(title: str, x: Sequence[str | float], y: Sequence[float], *, x_title: str, y_title: str, words: str) -> Chart:
    """One bar a value."""
    series = {"": [(a, b) for a, b in zip(x, y, strict=True)]}
    return drawn("bars", title, series, x_title=x_title, y_title=y_title, words=words)


def drawn(
    how: str,
    title: str,
    series: Mapping[str, Sequence[tuple[str | float, float | None]]],
    *,
    x_title: str,
    y_title: str,
    words: str,
) -> Chart:
    """Named series of (x, y) as `bars`, `lines` or `points`; x are numbers, or names in the order of their coming."""
    kinds = {"bars": {"type": "bar"}, "lines": {"type": "scatter", "mode": "lines+markers"},
             "points": {"type": "scatter", "mode": "markers"}}  # fmt: skip
    data = [
        {
            **kinds[how],
            "name": _plain(name),
            "x": [_plain(x) if isinstance(x, str) else x for x, _ in rows],
            "y": [y for _, y in rows],
            "marker": {"color": _LINES[number % len(_LINES)]},
        }
        for number, (name, rows) in enumerate(series.items())
    ]
    names = any(isinstance(x, str) for rows in series.values() for x, _ in rows)
    axis = _named(x_title) | ({"type": "category"} if names else {})
    layout = _layout(xaxis=axis, yaxis=_named(y_title), showlegend=len(series) > 1)
    return Chart(title, data, layout, words)


def points(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[str]]],
    *,
    x_title: str,
    y_title: str,
    words: str,
    equal: bool = True,
) -> Chart:
    """Points (x, y, what each is) of a few series, and where `equal` the line on which both are the same."""
    data: list[dict[str, object]] = []
    ends = [0.0]
    for number, (name, (x, y, hover)) in enumerate(series.items()):
        ends += [*x, *y]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _plain(name),
                "x": list(x),
                "y": list(y),
                "text": [_plain(text) for text in hover],
                "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
                "marker": {"color": _LINES[number % len(_LINES)], "size": 6, "opacity": 0.75},
            }
        )
    if equal:
        line = [min(ends), max(ends)]
        same = {"type": "scatter", "mode": "lines", "name": "equal", "x": line, "y": line, "hoverinfo": "skip"}
        data.append({**same, "line": {"color": "rgba(128,128,128,0.6)", "width": 1, "dash": "dot"}})
    axes = {"xaxis": _named(x_title), "yaxis": _named(y_title)}
    return Chart(title, data, _layout(**axes), words)


def heat_map(
    title: str,
    columns: Sequence[str],
    layers: Sequence[object],
    values: Sequence[Sequence[float | None]],
    hover: Sequence[Sequence[str]],
    *,
    words: str,
    p_values: Sequence[Sequence[float | None]] = (),
    tags: Mapping[str, str] | None = None,
    titles: tuple[str, str, str] = ("", "layer", "share"),
    reach: float = 1.0,
) -> Chart:
    """Values over rows and columns: as it stands, normalised effects over layers (or windows of them) and positions.

    Args:
        hover: what is said of each cell, as text.
        p_values: of the same cells, so that the page can leave out what may be chance.
        tags: what the map can be chosen by.
        titles: of the columns, of the rows, and of the values.
        reach: the value of the strongest colour; its negative has the opposite one.
    """
    across, down, quantity = map(_plain, titles)
    trace = {
        "type": "heatmap",
        "x": list(range(len(columns))),
        "y": list(range(len(layers))),
        "z": [list(row) for row in values],
        "text": [[_lines_of(text) for text in row] for row in hover],
        "hovertemplate": "%{text}<extra></extra>",
        "zmin": -reach,
        "zmax": reach,
        "colorscale": _DIVERGING,
        "colorbar": {"title": {"text": quantity}, "thickness": 10},
        "xgap": 1,
        "ygap": 1,
    }
    if p_values:
        trace["customdata"] = [list(row) for row in p_values]
    axes = {
        "xaxis": {
            "showgrid": False,
            "automargin": True,
            "title": {"text": across},
            "tickmode": "array",
            "tickvals": list(range(len(columns))),
            "ticktext": [_plain(c) for c in columns],
            "tickangle": 40,
            "zeroline": False,
        },
        "yaxis": {
            "showgrid": False,
            "title": {"text": down},
            "automargin": True,
            "tickmode": "array",
            "tickvals": list(range(len(layers))),
            "ticktext": [_plain(layer) for layer in layers],
            "autorange": True,
            "zeroline": False,
        },
        "height": 140 + 26 * len(layers),
        "margin": {"l": 56, "r": 16, "t": 12, "b": 80},
    }
    return Chart(title, [trace], _layout(**axes), words, dict(tags or {}))
