"""Templates: a few sentences with slots make hundreds of pairs.

    [[template]]
    id = "general"
    clean = "{person} was the general, and the men"
    answer = " cheered"
    wrong_answer = " fled"
    slots = { person = [["Grant", "Tom"], ["Churchill", "Bob"]] }

Each slot holds its fillings: a text for both prompts, or two texts, the first for the clean prompt and the
answer, the second for the corrupted prompt and the wrong answer. Slots are combined in all ways.
`corrupted` is the clean sentence unless given. What a slot filled is a marked span of its name, if it
stands once in both prompts. A pair's id is its template's with a digest of its texts: it stays the same
when fillings are added or moved. Pairs of one template resemble each other, so they are one cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from itertools import product
from string import Formatter

from .spans import unfit

__all__ = ["LARGEST", "expand"]

LARGEST = 10_000  # pairs of one template; the product of its slots grows fast
_TEXTS = ("clean", "corrupted", "answer", "wrong_answer")


def expand(template: Mapping[str, object]) -> list[dict[str, object]]:
    """The pairs of a template, as rows of a pair file; equal ones once.

    Args:
        template: keys of a pair, with `slots`.

    Raises:
        ValueError: it is malformed; the message says how.
    """
    slots = _slots(template.get("slots"))
    whole = {"corrupted": template.get("clean"), **template}
    missing = [key for key in ("id", *_TEXTS) if not whole.get(key)]
    if missing:
        raise ValueError(f"a template has no {missing[0]}")
    used = {name for text in _strings(whole) for name in _names(text)}
    strange, idle = sorted(used - set(slots)), sorted(set(slots) - used)
    if strange or idle:
        word = f"the slot {strange[0]!r} has no fillings" if strange else f"the slot {idle[0]!r} is used nowhere"
        raise ValueError(word)
    n = 1
    for fillings in slots.values():
        n *= len(fillings)
    if n > LARGEST:
        raise ValueError(f"the slots make {n} pairs; at most {LARGEST} are allowed")
    rows: dict[str, dict[str, object]] = {}
    for chosen in product(*slots.values()):
        row = _filled(whole, dict(zip(slots, chosen, strict=True)))
        rows.setdefault(str(row["id"]), row)
    return list(rows.values())


def _slots(value: object) -> dict[str, list[tuple[str, str]]]:
    if not isinstance(value, dict) or not value:
        raise ValueError("slots must be a table of lists, one for each {slot}")
    found: dict[str, list[tuple[str, str]]] = {}
    for name, fillings in value.items():
        if not isinstance(fillings, list) or not fillings:
            raise ValueError(f"the slot {name!r} must be a list of fillings")
        found[name] = []
        for filling in fillings:
            both = [filling, filling] if isinstance(filling, str) else filling
            if not (isinstance(both, list) and len(both) == 2 and all(isinstance(text, str) for text in both)):
                raise ValueError(f"a filling of {name!r} must be a text or two, found {filling!r:.60}")
            found[name].append((both[0], both[1]))
    return found


def _strings(template: Mapping[str, object]) -> list[str]:
    """The texts of a template in which slots may stand."""
    spans = template.get("spans") or {}
    if not isinstance(spans, dict) or not all(isinstance(both, list) and len(both) == 2 for both in spans.values()):
        raise ValueError("spans must be a table of pairs of texts")
    found: list[str] = []
    for value in [*(template[key] for key in _TEXTS), *spans.values()]:
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise ValueError(f"a text was expected, found {text!r:.60}")
            found.append(text)
    return found


def _names(text: str) -> list[str]:
    """The slots of a text; braces are written twice where they are meant."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r:.60}: {error}") from None
    for _, name, how, conversion in parts:
        if name is not None and (not name.isidentifier() or how or conversion):
            raise ValueError(f"{{{name}}} is no slot: a slot is a plain name in braces")
    return [name for _, name, *_ in parts if name is not None]


def _filled(template: Mapping[str, object], chosen: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    def fill(value: object, which: int) -> object:
        if isinstance(value, list):
            return [fill(text, which) for text in value]
        return str(value).format_map({name: both[which] for name, both in chosen.items()})

    row = {key: value for key, value in template.items() if key not in ("slots", "spans")}
    for key, which in zip(_TEXTS, (0, 1, 0, 1), strict=True):
        row[key] = fill(template[key], which)
    spans = _marked(str(row["clean"]), str(row["corrupted"]), chosen)
    given = template.get("spans") or {}
    assert isinstance(given, dict)
    spans |= {name: [fill(both[0], 0), fill(both[1], 1)] for name, both in given.items()}
    words = ", ".join(f"{name}: {' / '.join(dict.fromkeys(both))}" for name, both in chosen.items())
    digest = sha256("\0".join(str(row[key]) for key in _TEXTS).encode()).hexdigest()[:8]
    why = f"{template['why']} ({words})" if template.get("why") else words
    identity = {"id": f"{template['id']}-{digest}", "cluster": template.get("cluster") or template["id"], "why": why}
    return {**row, **identity, **({"spans": spans} if spans else {})}


def _marked(clean: str, corrupted: str, chosen: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """The fillings that can be told apart in both prompts, as spans; none where they cross."""
    once = {
        name: both
        for name, both in chosen.items()
        if all(text and prompt.count(text) == 1 for text, prompt in zip(both, (clean, corrupted), strict=True))
    }
    return {} if unfit(clean, corrupted, once) else {name: [*both] for name, both in once.items()}
