"""Circuits: sets of nodes, edges or latents, and how such a set is chosen from scores.

A circuit claims that these few components carry a behaviour and that the rest may take other values. Two ways
lead to one. `threshold` takes the components with the largest scores; an edge counts only while it lies on a
path from the embedding to the logits, since an edge that nothing enters or leaves cannot carry anything.
`greedy` then tries to do without each of them, the weakest first and many at once, and keeps what the
behaviour needs (ACDC, Conmy et al. 2023, with halving instead of one look an edge).

Nothing here knows a model: components are names in the order in which they are computed, sets are rows of
booleans. How faithful a set is, is the business of `faithfulness`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, did_you_mean

__all__ = ["Circuit", "Wiring", "ladder", "prune", "random_sets", "read_circuit", "threshold", "top_sets"]

Kind = Literal["nodes", "edges", "latents"]
Mask = NDArray[np.bool_]
EMBED, LOGITS = 0, -1  # the first and the last node of a wiring
_CROWDED = 0.25  # a uniformly drawn set of this share of all edges hangs together anyway
_TRIES = 8  # paths in a row that may be too long before a random set is filled up


@dataclass(frozen=True)
class Circuit:
    """A set of components with their scores, as it is written to circuit.json and read back after an edit.

    Attributes:
        kind: what the components are.
        components: names, in the order in which they are computed.
        scores: one a component, in the metric's unit; how they came about is `method`.
        model, model_revision, metric, pairs: what it was found with.
        ablation: what stands outside of the set: `counterpart`, `mean` or `zero`.
        selection: `threshold`, `greedy`, or `by hand`.
        method: where the scores come from.
        per_token: whether a component is kept at single positions; here always at all of them.
        saes: for latents: hook point -> SAE.
    """

    kind: Kind
    components: tuple[str, ...]
    scores: tuple[float, ...]
    model: str = ""
    model_revision: str = ""
    metric: str = "logit-diff"
    pairs: str = ""
    ablation: str = "counterpart"
    selection: str = "threshold"
    method: str = "exact"
    per_token: bool = False
    saes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of circuit.json: one component a line, so that a person can delete or add some."""
        head = {k: v for k, v in asdict(self).items() if k not in ("components", "scores")}
        lines = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
        both = zip(self.components, self.scores, strict=True)
        rows = ",\n".join("  " + json.dumps({"name": n, "score": s}, ensure_ascii=False) for n, s in both)
        return f'{lines},\n "components": [\n{rows}\n ]\n}}\n'

    def sorted(self) -> Circuit:
        """The same with its components by name, so that two files of one circuit are alike."""
        both = sorted(zip(self.components, (float(f"{score:.6g}") for score in self.scores), strict=True))
        return replace(self, components=tuple(name for name, _ in both), scores=tuple(score for _, score in both))

    def mask(self, names: Sequence[str]) -> Mask:
        """[N] bool: which of all components `names` are in it.

        Raises:
            InputError: it names a component that the model does not have.
        """
        place = {name: at for at, name in enumerate(names)}
        keep = np.zeros(len(names), dtype=bool)
        for name in self.components:
            if name not in place:
                raise InputError(
                    f"the circuit names {name!r}, which this model does not have",
                    why=f"its {self.kind} are called like {names[0]!r} and {names[-1]!r}",
                    fix=did_you_mean(name, names),
                    code="unknown-component",
                )
            keep[place[name]] = True
        return keep


def read_circuit(path: Path) -> Circuit:
    """Read a circuit.json, also one that a person has edited; a component may be a bare name.

    Raises:
        InputError: there is no such file, or it is no circuit.
    """
    try:
        value = json.loads(path.read_bytes())
        return _circuit(value)
    except OSError as error:
        fix = "name the circuit.json of a run of `greatctl patch --circuit`"
        raise InputError(f"the circuit {path} cannot be read", why=error.strerror or str(error), fix=fix) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is not a circuit", why=str(error), fix="see the circuit.json that greatctl wrote", where=str(path)
        ) from None


def _circuit(value: Any) -> Circuit:
    """The circuit of a parsed file, every field looked at."""
    rows = [{"name": row} if isinstance(row, str) else dict(row) for row in value["components"]]
    if not rows:
        raise ValueError("it has no component")
    names = [row["name"] for row in rows]
    if len(set(names)) < len(names):
        raise ValueError("a component is named twice")
    scores = tuple(float(row.get("score") or 0.0) for row in rows)
    known = {name: value[name] for name in Circuit.__dataclass_fields__ if name in value}
    known |= {"components": tuple(map(str, names)), "scores": scores}
    circuit = Circuit(**known)
    if circuit.kind not in ("nodes", "edges", "latents"):
        raise ValueError(f"its kind is {circuit.kind!r}, not nodes, edges or latents")
    if circuit.ablation not in ("counterpart", "mean", "zero"):
        raise ValueError(f"its ablation is {circuit.ablation!r}, not counterpart, mean or zero")
    return circuit


@dataclass(frozen=True)
class Wiring:
    """What edges connect. Nodes are numbered in the order in which they are computed; 0 is the embedding.

    Attributes:
        senders: [N] the node that an edge leaves.
        feeds: [N] the nodes that read the input where it ends (a key or value is read by a group of heads).
        n_nodes: all nodes; the last one is the logits.
    """

    senders: Sequence[int]
    feeds: Sequence[Sequence[int]]
    n_nodes: int

    def live(self, keep: Mask) -> Mask:
        """The edges of `keep` [N] that lie on a path of kept edges from the embedding to the logits."""
        edges = np.flatnonzero(keep).tolist()
        reached, reaching = np.zeros(self.n_nodes, dtype=bool), np.zeros(self.n_nodes, dtype=bool)
        reached[EMBED] = reaching[LOGITS] = True
        for edge in sorted(edges, key=lambda e: self.senders[e]):
            if reached[self.senders[edge]]:
                reached[list(self.feeds[edge])] = True
        for edge in sorted(edges, key=lambda e: -self.senders[e]):
            if any(reaching[node] for node in self.feeds[edge]):
                reaching[self.senders[edge]] = True
        alive = np.zeros_like(keep)
        for edge in edges:
            alive[edge] = reached[self.senders[edge]] and any(reaching[node] for node in self.feeds[edge])
        return alive

    def path(self, rng: random.Random) -> list[int]:
        """A random path of edges from the embedding to the logits, each step drawn evenly, from its end."""
        node, found = self.n_nodes - 1, []
        while node != EMBED:
            edge = rng.choice(self._incoming[node])
            found.append(edge)
            node = self.senders[edge]
        return found

    @cached_property
    def _incoming(self) -> list[list[int]]:
        """The edges that end at each node."""
        found: list[list[int]] = [[] for _ in range(self.n_nodes)]
        for edge, nodes in enumerate(self.feeds):
            for node in nodes:
                found[node].append(edge)
        return found


def threshold(scores: NDArray[np.float64], n: int, wiring: Wiring | None = None) -> Mask:
    """The `n` components with the largest |score|; of edges, the longest such list whose live part is at most n.

    Args:
        scores: [N]; ties go to the earlier component.
        n: 0 to N.
        wiring: what the components connect, where they are edges.
    """
    order = np.argsort(-np.abs(scores), kind="stable")

    def first(count: int) -> Mask:
        keep = np.zeros(len(scores), dtype=bool)
        keep[order[:count]] = True
        return keep if wiring is None else wiring.live(keep)

    if wiring is None or n >= len(scores):
        return first(n)
    low, high = min(n, len(scores)), len(scores)  # the live part grows with the list
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first(middle).sum() <= n else (low, middle - 1)
    return first(low)


def ladder(total: int) -> list[int]:
    """Set sizes to look at for the smallest that will do: 1, 2, 3, 4, 6, 8, 12, … up to `total`."""
    steps = {round(base * 2**power) for power in range(total.bit_length() + 1) for base in (1, 1.5)}
    return sorted({step for step in steps if step < total} | {total})


def top_sets(scores: NDArray[np.float64], sizes: Sequence[int], wiring: Wiring | None = None) -> NDArray[np.bool_]:
    """`threshold` for each of `sizes`: [len(sizes), N] bool."""
    return np.stack([threshold(scores, n, wiring) for n in sizes])


def prune(keep: Mask, scores: NDArray[np.float64], good: Callable[[Mask], bool], wiring: Wiring | None = None) -> Mask:
    """Take components out of a good set while it stays good, the weakest first, whole halves at a time.

    Args:
        keep: [N] the set to begin with.
        scores: [N], for the order alone.
        good: whether a set still does what it should; asked about 2 n log n times at the most.
        wiring: edges that are cut off by a removal go with it.

    Returns:
        A set that stays good without no further tried half of it; not the smallest there is, which would take a
        look at every subset.
    """
    order = np.flatnonzero(keep)
    order = order[np.argsort(np.abs(scores[order]), kind="stable")]
    waiting = [order]
    while waiting:
        some = waiting.pop()
        some = some[keep[some]]
        if not len(some):
            continue
        trial = keep.copy()
        trial[some] = False
        trial = trial if wiring is None else wiring.live(trial)
        if trial.any() and good(trial):
            keep = trial
        elif len(some) > 1:
            middle = len(some) // 2
            waiting += [some[middle:], some[:middle]]  # the weaker half is looked at first
    return keep


def random_sets(
    keep: Mask, draws: int, seed: int, *, wiring: Wiring | None = None, strata: Sequence[object] | None = None
) -> NDArray[np.bool_]:
    """Random sets of the size of `keep`, to which it is compared: [draws, N] bool.

    Of edges they are unions of random paths from the embedding to the logits (Shi et al. 2024), because evenly
    drawn edges hang together so rarely that any path would beat them. Of other components they are drawn evenly,
    as many from each stratum as `keep` has there.

    Args:
        keep: [N] bool.
        draws: how many sets.
        seed: seed of the draws.
        wiring: what edges connect.
        strata: [N] labels (the layer and kind of a latent, say).
    """
    rng = random.Random(seed)
    n, total = int(keep.sum()), len(keep)
    made = np.zeros((draws, total), dtype=bool)
    labels = [None] * total if strata is None else list(strata)
    pools: dict[object, list[int]] = {}
    for at, label in enumerate(labels):
        pools.setdefault(label, []).append(at)
    wanted = {label: int(keep[pool].sum()) for label, pool in pools.items()}
    for row in made:
        if wiring is not None and n <= _CROWDED * total:
            row[_paths(wiring, n, total, rng)] = True
            continue
        for label, pool in pools.items():
            row[rng.sample(pool, wanted[label])] = True
    return made


def _paths(wiring: Wiring, n: int, total: int, rng: random.Random) -> list[int]:
    """n edges: whole random paths while they fit, then edges between the nodes on them, then any."""
    found: set[int] = set()
    tries = 0
    while tries < _TRIES and len(found) < n:
        joined = found | set(wiring.path(rng))
        if len(joined) > n:
            tries += 1
            continue
        tries, found = (0 if len(joined) > len(found) else tries + 1), joined
    nodes = {wiring.senders[edge] for edge in found} | {wiring.n_nodes - 1}
    inner = [e for e in range(total) if wiring.senders[e] in nodes and nodes & set(wiring.feeds[e])]
    for pool in (inner, range(total)):
        left = [edge for edge in pool if edge not in found]
        found |= set(rng.sample(left, min(n - len(found), len(left))))
    return sorted(found)
