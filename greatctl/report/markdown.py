"""A view as Markdown: for papers, notebooks and pull requests.

Plain CommonMark with pipe tables and no HTML at all. Foreign text is escaped, so that it can start no markup and no
link; control characters are written out. Figures are said in their words, and the numbers behind them are in report.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .page import cell, shown
from .view import Block, Cell, Chart, Example, Hypothesis, Index, Label, Latent, Origin, Record, Table, View

__all__ = ["markdown"]

_LISTED = 50  # rows of a table
_LATENTS = 50  # of the list of all
_MARKUP = re.compile(r"([\\`*_\[\]<>|~$&@])")
_LINKS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE)  # what some readers make a link of by itself
_START = re.compile(r"^([#+\-=]|\d+(?=[.)]))")
_SPACE = re.compile(r"\s+")


def markdown(view: View) -> str:
    """The whole report as text."""
    lines = [f"# {_plain(view.title)}", "", _line(view.subtitle), ""]
    if view.findings:
        lines += ["## What was found", ""]
        lines += [f"{n}. {_plain(f.text)}{_origin(view, f.origin)}" for n, f in enumerate(view.findings, 1)]
        lines.append("")
    for section in view.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block), *_from(view, block), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _block(block: Block) -> list[str]:
    writers: dict[str, Callable[[Any], list[str]]] = {
        "table": _table, "chart": _chart, "hypothesis": _hypothesis, "latent": _latent, "index": _index, "record": _record,
    }  # fmt: skip
    if block.kind in writers:
        return writers[block.kind](block)
    if block.kind == "prose":
        head = [f"### {_plain(block.title or block.summary)}", ""] if block.title or block.summary else []  # type: ignore[union-attr]
        return [*head, *(_line(line) for line in block.text.splitlines())]  # type: ignore[union-attr]
    return [f"**{_plain(block.title)}.** {_plain(block.words)}"]  # type: ignore[union-attr]


def _chart(chart: Chart) -> list[str]:
    """What is to be seen in it, and the numbers where it carries them."""
    said = [f"**{_plain(chart.title)}.** {_plain(chart.words)}"]
    return [*said, "", *_table(replace(chart.numbers, caption=""))] if chart.numbers else said


def _label(label: Label | None) -> list[str]:
    """What a labeler called a latent, and why it may be doubted."""
    if label is None:
        return []
    words = f"“{_plain(label.name)}”{': ' + _plain(label.description) if label.description else ''}"
    said = f"Label by {_plain(label.by)}, no part of any verdict: {words}. " if label.name else ""
    rows = [[s.task, s.value, s.low, s.high, s.shuffled, s.n] for s in label.scores] if label.name else []
    table = _rows([f"it, asked about unseen {label.asked_about}", "accuracy", "from", "to", "another latent's label", "n"],
                  rows, range(1, 6))  # fmt: skip
    return [f"{said}{_plain(label.doubt)}".strip(), "", *(table if rows else []), ""]


def _table(table: Table) -> list[str]:
    head = [f"**{_plain(table.caption)}**", ""] if table.caption else []
    shown_rows = table.rows[:_LISTED]
    lines = _rows(table.headers, shown_rows, table.numeric, table.digits)
    left = len(table.rows) - len(shown_rows)
    return [*head, *lines, *(["", f"{left:,} more rows are in report.json."] if left else [])]


def _rows(headers: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: Sequence[int], digits: int = 3) -> list[str]:
    rule = ["---:" if n in numeric else "---" for n in range(len(headers))]
    body = [[_plain(cell(value, digits)) for value in row] for row in rows]
    return [_pipe([_plain(h) for h in headers]), _pipe(rule), *map(_pipe, body)]


def _pipe(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _hypothesis(one: Hypothesis) -> list[str]:
    own: list[Cell] = [
        "this latent",
        one.value,
        f"95 % {cell(one.low)} to {cell(one.high)}" if one.low is not None else "",
    ]
    rivals = [[r.name, r.value, r.about] for r in one.rivals]
    said = one.claim if one.claim == "nothing yet" else f"it {one.claim} '{one.concept}', and no more"
    gate = [[c.number, c.name, c.state, c.reason] for c in one.gate]
    lines = [
        f"### Latent {one.latent} ({_plain(one.name)}) and {_plain(one.concept)}: {_plain(one.verdict)}",
        "",
        *_label(one.label),
        f"May be said: {_plain(said)}. Why {_plain(one.verdict)}: {_plain(one.reason)}.",
        "",
        *_rows([f"AUROC on held-out {one.units}", "value", "about"], [own, *rivals], [1]),
        "",
        *_rows(["check", "name", "state", "reason"], gate, [0]),
        "",
        _facts(one.facts),
    ]
    headers = ["the latent is", "by", "effect", "random: from", "to", "damage, nats a token"]
    return [*lines, "", *_rows(headers, one.doses, range(1, 6))] if one.doses else lines


def _latent(one: Latent) -> list[str]:
    verdicts = "; ".join(f"{concept}: {verdict}" for concept, verdict in one.verdicts)
    lines = [
        f"### Latent {one.latent}: {_plain(one.name)}",
        "",
        *_label(one.label),
        _plain(verdicts),
        "",
        _facts(one.facts),
        "",
    ]
    for name, tokens in (("Makes likelier", one.up), ("Makes less likely", one.down)):
        if tokens:
            lines += [f"{name}: {', '.join(_plain(shown(repr(token)[1:-1])) for token in tokens)}.", ""]
    for example in one.examples:
        lines += [f"> {_passage(example)}", ">", f"> {cell(example.activation)}, {_plain(example.source)}", ""]
    for facet in one.facets:
        shares = [[s.name, s.role, s.value, s.low, s.high] for s in facet.shares[:10]]
        lines += [*_rows([facet.name, "role", "mean", "from", "to"], shares, [2, 3, 4]), ""]
    return lines


def _passage(example: Example) -> str:
    """The passage, with the tokens on which it fires at half its height and more in bold."""
    parts = []
    for token, strength in zip(example.tokens, example.strengths, strict=True):
        text = _plain(shown(token), keep=True)
        core = text.strip()
        parts.append(text.replace(core, f"**{core}**") if strength >= 0.5 and core else text)
    return "".join(parts).strip()


def _facts(facts: Sequence[tuple[str, Cell]]) -> str:
    return "; ".join(f"{_plain(name)} {_plain(cell(value))}" for name, value in facts) + ("." if facts else "")


def _index(index: Index) -> list[str]:
    columns = index.columns
    rows = [
        [str(columns["latent"][n]), columns["label"][n] or " · ".join(columns["tokens"][n]), columns["density"][n],  # type: ignore[arg-type]
         columns["max"][n]]
        for n in range(min(_LATENTS, len(columns["latent"])))
    ]  # fmt: skip
    headers = ["latent", "its label, or tokens", "fires on", "largest"]
    return [_plain(index.words), "", *_rows(headers, rows, [2, 3])]  # type: ignore[arg-type]


def _record(record: Record) -> list[str]:
    settings = [[name, value, origin] for name, value, origin in record.settings]
    facts = [
        ("fingerprint", record.fingerprint),
        *record.facts,
        *((f"made from {n}", v) for n, v in record.inputs[:20]),
    ]
    lines = [f"### {_plain(record.stage)}: {_plain(record.path)}", ""]
    lines += [f"* {_plain(name)} {_plain(value)}" for name, value in facts]
    return [*lines, "", *_rows(["setting", "value", "set by"], settings, [])] if settings else lines


def _from(view: View, block: Block) -> list[str]:
    text = _origin(view, block.origin).strip()
    return ["", text] if text and block.kind != "prose" else []


def _origin(view: View, origin: Origin | None) -> str:
    record = view.records.get(origin.fingerprint) if origin else None
    return f" (from {_plain(record.path)}, {_plain(origin.file)})" if record and origin else ""


def _plain(text: object, *, keep: bool = False) -> str:
    """Text without markup in one line; `keep` leaves the spaces at its ends."""
    line = _SPACE.sub(" ", str(text)) if keep else _SPACE.sub(" ", str(text)).strip()
    printed = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    return _LINKS.sub(r"\\", _MARKUP.sub(r"\\\1", printed))


def _line(text: str) -> str:
    """Text that begins a line, and could begin a list or a heading there."""
    plain = _plain(text)
    return _START.sub(lambda m: m[1] + "\\" if m[1].isdigit() else "\\" + m[1], plain)
