"""The section on a circuit: the verdict, the graph drawn, the faithfulness curve, random sets, and every component.

The drawing is plain SVG: the stream runs upwards, layers are rows, heads stand below the MLP of their layer, and an
edge is as thick as its score. It needs no script, its words are escaped like all others, and the tables beside it say
the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..store.artifact import Artifact
from .charts import bars, lines
from .tables import rows as read_rows
from .view import Block, Box, Drawing, Finding, Line, Origin, Prose, Table, read_from

__all__ = ["finding", "section"]

_DRAWN = 60  # edges, nodes or latents in a drawing; all are in the table
_ROW, _STEP, _MARGIN = 64, 84, 60  # pixels between rows, between boxes, and left of them
_ACROSS = 12  # latents in a row of the drawing
_BINS = 20
_INPUT = re.compile(r"a(\d+)\.(h|kv)(\d+)\.([qkv])")
_NODE = re.compile(r"(?:a(\d+)\.h(\d+)|m(\d+))")


def finding(name: str, artifact: Artifact) -> Finding:
    """A circuit's verdict in one sentence with numbers."""
    circuit = artifact.summary["circuit"]
    text = f"In {name}: {circuit['verdict']} (CPR {_two(circuit['cpr'])}, CMD {_two(circuit['cmd'])})."
    return Finding(text, "patching", Origin(artifact.fingerprint, "circuit.json"))


def section(name: str, artifact: Artifact) -> list[Block]:
    """Everything about one circuit."""
    summary = artifact.summary
    circuit = summary["circuit"]
    rows = [row for row in read_rows(artifact.path / "components.parquet") if row["in_circuit"]]
    rows.sort(key=lambda row: -abs(row["score"]))
    minimal = {row["component"]: row for row in read_rows(artifact.path / "minimality.parquet")}
    found = {
        "circuit.json": Prose(_words(name, summary, circuit), title=name),
        "components.parquet": drawing(f"{name}: the circuit", rows, circuit),
        "curve.parquet": _curve(name, read_rows(artifact.path / "curve.parquet"), circuit),
        "random_sets.parquet": _random(name, read_rows(artifact.path / "random_sets.parquet"), circuit),
        "minimality.parquet": _table(name, rows, minimal),
    }
    return [block for file, one in found.items() for block in read_from(artifact, file, [one])]


def _words(name: str, summary: Mapping[str, Any], circuit: Mapping[str, Any]) -> str:
    verdict = circuit["verdict"][0].upper() + circuit["verdict"][1:]
    held = (
        f"It was chosen on {circuit['chosen_on']} pairs and measured on {circuit['judged_on']} others."
        if circuit["held_out"]
        else f"It was measured on the {circuit['judged_on']} pairs that chose it, since none is held out."
    )
    other = circuit["other_ablation"]
    scores = " The scores that chose it are estimates from gradients." if circuit["approximate"] else ""
    errors = circuit.get("error_terms")
    scores += (
        f" What the autoencoders leave unexplained restores {_two(errors['alone'])} by itself, all latents without it "
        f"{_two(errors['without'])}."
        if errors
        else ""
    )
    steps = circuit.get("two_step")
    more = f" Two-step induction: {'yes' if steps['found'] else 'no'}; {steps['why']}." if steps else ""
    return (
        f"{verdict}. {held}{scores} What is outside of it takes the values of the "
        f"{'counterpart prompt' if circuit['ablation'] == 'counterpart' else circuit['ablation'] + ' ablation'}, at all "
        f"positions; with those of the {other['ablation']} it restores {_two(other['faithfulness'])}. "
        f"{circuit['needed']} of {circuit['looked_at']} components matter more than components that were added at "
        f"random.{more} circuit.json can be edited and tested again."
    )


def drawing(title: str, rows: Sequence[Mapping[str, Any]], circuit: Mapping[str, Any]) -> Drawing:
    """The strongest components of `rows` (component, score), drawn from the bottom upwards."""
    shown = list(rows[:_DRAWN])
    largest = max((abs(row["score"]) for row in shown), default=0.0) or 1.0
    group = max(1, circuit.get("n_heads", 1) // max(1, circuit.get("n_kv_heads", 1)))
    edges = [(*_ends(row["component"]), row) for row in shown] if circuit["kind"] == "edges" else []
    names = {row["component"] for row in shown} if not edges else {"embed", "logits"}
    for sender, receiver, _, _ in edges:
        names |= {sender} | ({receiver} if not receiver.startswith("kv") else set())
    heads = [name for name in names if name.startswith("a")]
    places, height = _places(sorted(names, key=_order), wrap=circuit["kind"] not in ("edges", "nodes"))
    kind = "estimated " if circuit.get("approximate") else ""
    drawn = []
    for sender, receiver, slot, row in edges:
        width = 1 + 6 * abs(row["score"]) / largest
        for node in _readers(receiver, heads, group):
            if node in places:
                (x1, y1), (x2, y2) = places[sender], places[node]
                about = f"{row['component']}: {kind}{row['score']:+.3g}"
                drawn.append(Line(x1, y1 - 13, x2, y2 + 13, round(width, 2), slot, about))
    scores = {row["component"]: row["score"] for row in shown}
    boxes = [
        Box(x, y, _short(name), f"{name}: {kind}{scores[name]:+.3g}" if name in scores else name,
            round(abs(scores.get(name, 0.0)) / largest, 3))
        for name, (x, y) in places.items()
    ]  # fmt: skip
    across = max((x for x, _ in places.values()), default=0) + _MARGIN
    rest = f" The {len(rows) - len(shown):,} weaker ones are not drawn." if len(rows) > len(shown) else ""
    guess = f", scores being estimates by {circuit['scores']}" if circuit.get("approximate") else ""
    words = (
        f"{len(shown)} {circuit['kind']}, the earliest at the bottom; the strongest is {shown[0]['component']} with a score "
        f"of {shown[0]['score']:+.3g} in the metric's unit{guess}.{rest}"
        if shown
        else "The circuit is empty."
    )
    return Drawing(title, across, height, drawn, boxes, words)


def _places(names: Sequence[str], *, wrap: bool) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each box stands, and the height: a row for each half of a layer that has any, the first at the bottom.

    Latents `wrap` into further rows of their layer, since a layer may have dozens and no line runs between them.
    """
    rows: dict[tuple, list[str]] = {}
    for name in names:
        half = _order(name)[:2]
        before = sum(len(row) for key, row in rows.items() if key[:2] == half)
        rows.setdefault((*half, before // _ACROSS if wrap else 0), []).append(name)
    widest = max((len(row) for row in rows.values()), default=1)
    height = _ROW * (len(rows) + 1)
    places = {}
    for number, key in enumerate(sorted(rows)):
        indent = _MARGIN + (widest - len(rows[key])) * _STEP // 2
        for at, name in enumerate(rows[key]):
            places[name] = (indent + at * _STEP, height - _ROW * (number + 1))
    return places, height


def _order(name: str) -> tuple[int, int, int, str]:
    """Layer, heads before the MLP, number; the embedding first and the logits last."""
    if name in ("embed", "logits"):
        return (-1, 0, 0, name) if name == "embed" else (1 << 30, 0, 0, name)
    found = _NODE.fullmatch(name)
    if found:
        return (int(found[1]), 0, int(found[2]), name) if found[1] else (int(found[3]), 1, 0, name)
    hook, _, latent = name.partition("#")  # a latent
    return int(hook.split(".")[1]), 0, int(latent) if latent.isdigit() else 1 << 30, name


def _ends(edge: str) -> tuple[str, str, str]:
    """Sender, the node that reads (`kvLAYER.HEAD` for keys and values), and what it is read as."""
    sender, _, receiver = edge.partition("->")
    found = _INPUT.fullmatch(receiver)
    if not found:
        node = receiver.removesuffix(".in")
        return sender, node, "logits" if node == "logits" else "mlp"
    layer, kind, head, slot = found.groups()
    return sender, f"a{layer}.h{head}" if kind == "h" else f"kv{layer}.{head}", slot


def _readers(receiver: str, heads: Sequence[str], group: int) -> list[str]:
    """The drawn nodes that read an input: for keys and values the drawn heads of the group."""
    if not receiver.startswith("kv"):
        return [receiver]
    layer, head = map(int, receiver[2:].split("."))
    return [f"a{layer}.h{q}" for q in range(head * group, (head + 1) * group) if f"a{layer}.h{q}" in heads]


def _short(name: str) -> str:
    """What fits into a box: of a latent its layer and number."""
    hook, sign, latent = name.partition("#")
    return f"L{hook.split('.')[1]} #{latent}" if sign else name


def _curve(name: str, rows: Sequence[Mapping[str, Any]], circuit: Mapping[str, Any]) -> Block:
    kinds = list(dict.fromkeys(row["ablation"] for row in rows))
    shares = list(dict.fromkeys(row["share"] for row in rows))
    series = {f"outside: {kind}": [row["faithfulness"] for row in rows if row["ablation"] == kind] for kind in kinds}
    words = (
        f"Faithfulness of the best {circuit['kind']} by score over the share that is kept; 1 is the whole effect. "
        f"Area under it (CPR) {_two(circuit['cpr'])}, area of the distance to 1 (CMD) {_two(circuit['cmd'])}, with the "
        f"{circuit['ablation']} outside."
    )
    chart = lines(f"{name}: faithfulness over size", shares, series, x_title="share of all components", words=words)
    layout = {
        **chart.layout,
        "xaxis": {**chart.layout["xaxis"], "type": "log", "dtick": 1},
        "yaxis": {"rangemode": "normal"},
    }
    return replace(chart, layout=layout)


def _random(name: str, rows: Sequence[Mapping[str, Any]], circuit: Mapping[str, Any]) -> Block:
    values = np.array([row["faithfulness"] for row in rows if row["faithfulness"] is not None], dtype=float)
    values = values[np.isfinite(values)]
    own, random = circuit["faithfulness"]["value"], circuit["random"]
    if not len(values):
        return Prose("No random set could be measured.", quiet=True)
    counts, borders = np.histogram(values, bins=_BINS)
    middles = [float(f"{x:.3g}") for x in (borders[:-1] + borders[1:]) / 2]
    words = (
        f"Faithfulness of {random['draws']} random sets of {circuit['size']:,} {circuit['kind']}: "
        f"{values.min():.2f} to {values.max():.2f}, median {np.median(values):.2f}; the circuit has {_two(own)}. "
        f"{random['as_good']} are as near to 1 (p = {random['p_value']:.2g} that it beats no more than nine of ten)."
    )
    return bars(
        f"{name}: random sets of equal size",
        middles,
        counts.tolist(),
        x_title="faithfulness",
        y_title="sets",
        words=words,
    )


def _table(name: str, rows: Sequence[Mapping[str, Any]], minimal: Mapping[str, Mapping[str, Any]]) -> Table:
    guessed = any(row.get("approximate") for row in rows)
    headers = ["component", "estimated score" if guessed else "score", "f lost without it", "p", "needed"]
    cells = []
    for row in rows:
        found = minimal.get(row["component"], {})
        change, p = found.get("change"), found.get("p_value")
        needed = found.get("needed")
        cells.append([row["component"], _number(row["score"]), _number(change), _number(p), needed])
    return Table(headers, cells, numeric=(1, 2, 3), caption=f"Components of {name}", folded=True)


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _two(value: float | None) -> str:
    return "not available" if value is None else f"{value:.2f}"
