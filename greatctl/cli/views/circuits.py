"""What a circuit looks like in a terminal: the verdict first, then the curve, what was tested, and what it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType

from ...stages.context import Result
from ..text import literal
from .table import facts, near, number, table

__all__ = ["render_circuit"]

_SHOWN = 16  # components; all are in circuit.json


def render_circuit(result: Result) -> RenderableType:
    """Verdict, curve under both ablations, tests, components, and why pairs were refused."""
    summary = result.summary
    circuit: Mapping = summary["circuit"]  # type: ignore[assignment]
    parts: list[RenderableType] = [literal(circuit["verdict"], "bold"), "", _facts(summary, circuit)]
    parts += [_curve(list(result.view["curve"])), _areas(circuit), _components(circuit)]  # type: ignore[call-overload]
    if circuit.get("two_step"):
        found = circuit["two_step"]
        said = "two-step induction: yes" if found["found"] else "two-step induction: no"
        parts.append(literal(f"{said}; {found['why']}"))
    for name, reason in list(result.view.get("refused") or [])[:8]:  # type: ignore[call-overload]
        parts.append(literal(f"refused {name}: {reason}", "yellow"))
    if result.artifact:
        parts.append(facts([("artifact", near(result.artifact))]))
    return Group(*parts)


def _facts(summary: Mapping, circuit: Mapping) -> RenderableType:
    whose = f"{circuit['judged_on']} held-out pairs; {circuit['chosen_on']} others chose it"
    if not circuit["held_out"]:
        whose = f"the {circuit['judged_on']} pairs that chose it (none is held out)"
    estimated = ", estimates" if circuit["approximate"] else ""
    random, tried = circuit["random"], circuit["looked_at"]
    p = f"p = {number(random['p_value'])} (floor {number(random['floor'])})"
    rows: list[tuple[str, object]] = [
        ("model", summary["model"]),
        ("circuit", f"{circuit['size']:,} of {circuit['of']:,} {circuit['kind']}, {circuit['selection']}"),
        ("scores", f"{circuit['scores']}{estimated}"),
        ("outside of it", f"{circuit['ablation']}, at all positions"),
        *((("saes", ", ".join(circuit["saes"])),) if circuit.get("saes") else ()),
        ("pairs", f"{summary['n_pairs']} executed, {summary['n_refused']} refused"),
        ("measured on", whose),
        (str(summary["metric"]), f"clean {number(summary['clean'])}, corrupted {number(summary['corrupted'])}"),
        ("random sets", f"{random['as_good']} of {random['draws']} as good, {p}"),
        *((("error terms", _errors(circuit["error_terms"])),) if circuit.get("error_terms") else ()),
        ("minimality", f"{circuit['needed']} of {tried} matter more than random additions"),
    ]
    return facts(rows)


def _curve(rows: Sequence[Mapping]) -> RenderableType:
    """Faithfulness over size, a column an ablation."""
    kinds = list(dict.fromkeys(row["ablation"] for row in rows))
    by = {(row["ablation"], row["share"]): row for row in rows}
    cells = []
    for share in dict.fromkeys(row["share"] for row in rows):
        line: list[object] = [f"{share:g}", by[kinds[0], share]["n"]]
        for kind in kinds:
            row = by[kind, share]
            line += [_value(row["faithfulness"]), _between(row)]
        cells.append(line)
    head = ["share kept", "n", *(word for kind in kinds for word in (f"f, {kind}", "95 %"))]
    view = table(head, cells, right=tuple(range(len(head))))
    for column in view.columns:
        column.no_wrap = True
    return view


def _areas(circuit: Mapping) -> RenderableType:
    """This very set, and the areas of the curves."""
    other = circuit["other_ablation"]
    f = circuit["faithfulness"]
    cells = [
        (
            circuit["ablation"],
            f"{_value(f['value'])} ({_between(f)})",
            _value(circuit["complement"]["value"]),
            _value(circuit["cpr"]),
            _value(circuit["cmd"]),
        ),
        (
            other["ablation"],
            f"{_value(other['faithfulness'])} ({_between(other)})",
            _value(other["complement"]),
            _value(other["cpr"]),
            _value(other["cmd"]),
        ),
    ]
    return table(["outside of it", "f of the circuit", "f without it", "CPR", "CMD"], cells, right=(1, 2, 3, 4))


def _components(circuit: Mapping) -> RenderableType:
    names = list(circuit["components"])[:_SHOWN]
    more = circuit["size"] - len(names)
    words = ", ".join(names) + (f" and {more:,} more (circuit.json)" if more > 0 else "")
    return literal(words, "dim")


def _errors(found: Mapping) -> str:
    """What the autoencoders leave unexplained is part of any circuit of latents that works; so it is said how large."""
    return f"alone restore {_value(found['alone'])}; all latents without them {_value(found['without'])}"


def _value(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2f}"


def _between(row: Mapping) -> str:
    low, high = row["low"], row["high"]
    return "–" if low is None or low != low else f"{low:.2f} … {high:.2f}"
