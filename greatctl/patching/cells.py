"""What a sweep consists of: places to patch, tasks (one cell of one pair), and the batches that they are cut into.

A place is a single position, a marked span, or all positions. Positions before a task's first changed one
need no computing where the model reuses a prefix, so tasks are ordered by it, and a batch starts at the
first one of its tasks. How many batches are worth their fixed cost is a small shortest-path problem. The cut
depends on the pairs, the site and two numbers that are written down when a sweep begins; so an interrupted
sweep goes on with the same batches, whatever the memory is by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .pairs import EncodedPair
from .runs import Group, ends

__all__ = ["Batch", "Place", "Plan", "batches_of", "places_of", "plan_of"]


@dataclass(frozen=True)
class Place:
    """Where a cell is: a position of the clean prompt, or a span of a name (`all`: every position)."""

    position: int | None = None
    span: str | None = None


@dataclass(frozen=True)
class Batch:
    """Tasks that go through the model together; three lists of the same length.

    Attributes:
        rows: the pair of each task in its group.
        places: index of its place.
        units: its unit, -1 for all units.
        start: first position that has to be computed.
    """

    rows: tuple[int, ...]
    places: tuple[int, ...]
    units: tuple[int, ...]
    start: int

    def part(self, begin: int, end: int) -> Batch:
        """Some of its tasks."""
        return Batch(self.rows[begin:end], self.places[begin:end], self.units[begin:end], self.start)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Plan:
    """One group in one direction.

    Attributes:
        places: the table's columns.
        masks: per branch [places, b, p] bool: the patched run's positions that a place overwrites.
        first: [places, b] the first position that the patch changes; -1 where it changes nothing, -2 where
            the pair has no such place.
    """

    places: Sequence[Place]
    masks: Sequence[torch.Tensor]
    first: torch.Tensor

    @cached_property
    def exists(self) -> torch.Tensor:
        """[places, b] bool: whether the pair has the place."""
        return self.first > -2

    @cached_property
    def changes(self) -> torch.Tensor:
        """[places, b] bool: whether a patch there can change anything."""
        return self.first >= 0


def places_of(pairs: Sequence[EncodedPair], positions: str) -> list[Place]:
    """The places of the table of a group's pairs: `each`, `spans` or `all`."""
    if positions == "each":
        return [Place(position=at) for at in range(len(pairs[0].clean_ids))]
    if positions == "all":
        return [Place(span="all")]
    return [Place(span=name) for name in dict.fromkeys(name for pair in pairs for name in pair.spans)]


def plan_of(group: Group, direction: str, positions: str | Sequence[Place]) -> Plan:
    """Places (or the names of `places_of`), and what each of them changes in each pair."""
    places = places_of(group.pairs, positions) if isinstance(positions, str) else positions
    base, _ = ends(direction)
    masks = []
    for number, branch in enumerate(group.branches):
        there = _open(group, direction, number)
        mask = torch.zeros(len(places), *there.shape, dtype=torch.bool)
        for at, place in enumerate(places):
            for row, pair in enumerate(group.pairs):
                if place.span == "all":
                    mask[at, row] = True
                    continue
                clean = [place.position] if place.span is None else pair.spans.get(place.span, ((), ()))[0]
                wanted = set(clean)
                if base == 0:
                    mask[at, row, [i for i in clean if i is not None]] = True
                else:
                    mask[at, row, [j for i, j in pair.alignment if i in wanted]] = True
        masks.append((mask & there).to(branch.tokens[base].device))
    return Plan(places, masks, _first(group, direction, places, masks[0].cpu()))


def batches_of(
    plan: Plan, units: Sequence[int], length: int, batch_cells: int, overhead: int, *, prefix: bool = True
) -> list[Batch]:
    """Cut all tasks of a plan into batches of at most `batch_cells`.

    Args:
        plan: the places and what they change.
        units: the units of the site, [-1] where it has none.
        length: positions of the patched run.
        batch_cells: the most tasks of a batch.
        overhead: what a batch costs besides its tokens, in tokens.
        prefix: whether the model reuses a prefix.
    """
    found: dict[int, list[tuple[int, int, int]]] = {}
    for at in range(len(plan.places)):
        for row in range(plan.first.shape[1]):
            if plan.changes[at, row]:
                start = int(plan.first[at, row]) if prefix else 0
                found.setdefault(start, []).extend((row, at, unit) for unit in units)
    starts = sorted(found)
    made: list[Batch] = []
    for begin, end in _cuts(starts, [len(found[s]) for s in starts], length, batch_cells, overhead):
        tasks = [task for start in starts[begin:end] for task in found[start]]
        pieces = -(-len(tasks) // batch_cells)
        size = -(-len(tasks) // pieces)
        for at in range(0, len(tasks), size):
            rows, places, chosen = zip(*tasks[at : at + size], strict=True)
            first = min(int(plan.first[p, r]) for r, p in zip(rows, places, strict=True)) if prefix else 0
            made.append(Batch(rows, places, chosen, first))
    return made


def _open(group: Group, direction: str, number: int) -> torch.Tensor:
    """[b, p] bool on the CPU: positions that a patch may overwrite.

    Not those without a value to take, not special tokens where the site knows nothing of them, and not what
    stands before the first differing token, which is equal in both runs.
    """
    there = group.there(direction, number).cpu()
    tokens = group.branches[number].tokens[ends(direction)[0]].cpu()
    if group.site.skips:
        there = there & ~torch.isin(tokens, torch.tensor(sorted(group.site.skips)))
    if group.corruption == "counterpart":
        first = torch.tensor([pair.first_difference for pair in group.pairs])
        there = there & (torch.arange(there.shape[1]) >= first[:, None])
    return there


def _first(group: Group, direction: str, places: Sequence[Place], mask: torch.Tensor) -> torch.Tensor:
    """[places, b]; see `Plan.first`. A place of which nothing may be overwritten is still there, unchanged, where
    it has a value to take."""
    base, _ = ends(direction)
    match = group.match(direction, 0).cpu() >= 0
    found = torch.full(mask.shape[:2], -2, dtype=torch.long)
    for at, place in enumerate(places):
        for row, pair in enumerate(group.pairs):
            patched = mask[at, row].nonzero()[:, 0]
            if len(patched):
                found[at, row] = int(patched[0])
            elif place.span is not None:
                found[at, row] = -1 if place.span in ("all", *pair.spans) else -2
            elif group.corruption == "counterpart":
                known = [both[base] for both in pair.alignment if both[0] == place.position]
                found[at, row] = -1 if known and bool(match[row, known[0]]) else -2
    return found


def _cuts(starts: Sequence[int], counts: Sequence[int], length: int, most: int, overhead: int) -> list[tuple[int, int]]:
    """Consecutive runs of `starts` with the least total cost: tokens computed plus `overhead` a batch."""
    n = len(starts)
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, n + 1):
        options = []
        tasks = 0
        for begin in range(end - 1, -1, -1):
            tasks += counts[begin]
            cost = tasks * (length - starts[begin]) + overhead * -(-tasks // most)
            options.append((best[begin][0] + cost, begin))
        best.append(min(options))
    cuts, end = [], n
    while end:
        begin = best[end][1]
        cuts.append((begin, end))
        end = begin
    return cuts[::-1]
