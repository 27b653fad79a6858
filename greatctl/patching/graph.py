"""The computation as a graph: who writes into the residual stream, who reads from it, and what they are called.

Every head, MLP and the embedding *adds* to the stream, and every projection *reads* the sum of all that was added
before it. So an edge leads from each sender to each input behind it, and cutting one is well defined. A query head
has an input of its own; keys and values are read once for each key-value head, which serves a whole group of query
heads, so a grouped-query model has fewer k and v inputs than heads and none of them is invented here.

Inside a block the heads come first and the MLP reads what they wrote. Names are short and sort well: the nodes
`embed`, `a3.h5` (head 5 of layer 3), `m3`, `logits`; the inputs `a3.h5.q`, `a3.kv1.k`, `a3.kv1.v`, `m3.in`,
`logits.in`; the edge `a0.h0->a1.kv0.k`. Needs no torch, so that the command line can check them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from ..errors import UsageError, did_you_mean

__all__ = ["SLOTS", "Edge", "Graph", "Input", "Node", "Sized", "graph", "parse_edge", "parse_input", "parse_node"]

SLOTS = ("q", "k", "v", "mlp", "logits")
ARROW = "->"
_NODE = re.compile(r"(?P<embed>embed)|(?P<logits>logits)|a(?P<layer>\d+)\.h(?P<head>\d+)|m(?P<mlp>\d+)")
_INPUT = re.compile(
    r"(?P<logits>logits\.in)|a(?P<layer>\d+)\.(?:h(?P<q>\d+)\.q|kv(?P<kv>\d+)\.(?P<slot>[kv]))|m(?P<mlp>\d+)\.in"
)


class Node(NamedTuple):
    """Something that writes into the stream, or `logits`, the end of it.

    Attributes:
        kind: `embed`, `head`, `mlp` or `logits`.
        layer: its block; -1 for the embedding. For the logits always -2, so that a name alone says which node it is.
        head: query head, or -1.
    """

    kind: str
    layer: int = -1
    head: int = -1

    @property
    def name(self) -> str:
        """`embed`, `a3.h5`, `m3` or `logits`."""
        return {"head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}.get(self.kind, self.kind)


class Input(NamedTuple):
    """What one projection reads.

    Attributes:
        slot: one of `SLOTS`.
        layer: its block; -2 for the logits.
        head: query head (slot q), key-value head (slots k and v), or -1.
    """

    slot: str
    layer: int = -2
    head: int = -1

    @property
    def name(self) -> str:
        """`a3.h5.q`, `a3.kv1.k`, `m3.in` or `logits.in`."""
        if self.slot in ("mlp", "logits"):
            return f"m{self.layer}.in" if self.slot == "mlp" else "logits.in"
        return f"a{self.layer}.{'h' if self.slot == 'q' else 'kv'}{self.head}.{self.slot}"


class Edge(NamedTuple):
    """What a sender adds to one input."""

    sender: Node
    receiver: Input

    @property
    def name(self) -> str:
        """`a0.h0->a1.kv0.k`."""
        return f"{self.sender.name}{ARROW}{self.receiver.name}"


EMBED, LOGITS, LOGITS_IN = Node("embed", -1), Node("logits", -2), Input("logits")


class Sized(Protocol):
    """What a graph is made from; any frozen model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int


@dataclass(frozen=True)
class Graph:
    """All nodes, inputs and edges of a model.

    The senders have one order, that in which they are computed, and everything that an input can read is a prefix of
    it (`reach`); so masks over edges are rectangles [senders, inputs] with the tail of a column empty.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int

    @property
    def group(self) -> int:
        """Query heads a key-value head serves."""
        return self.n_heads // self.n_kv_heads

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """embed, then layer by layer all heads and the MLP."""
        return (EMBED, *(node for layer in range(self.n_layers) for node in self.block(layer)))

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The senders and the logits."""
        return (*self.senders, LOGITS)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Layer by layer q of each head, k and v of each key-value head, the MLP's; the logits' last."""
        return (*(one for layer in range(self.n_layers) for one in self.inputs_of(layer)), LOGITS_IN)

    @property
    def edges(self) -> Iterator[Edge]:
        """All edges, input by input; 800 thousand in an 8B model, so they are made one at a time."""
        return (Edge(sender, one) for one in self.inputs for sender in self.senders[: self.reach(one)])

    @property
    def n_edges(self) -> int:
        """How many there are."""
        return sum(self.reach(one) for one in self.inputs)

    def block(self, layer: int) -> tuple[Node, ...]:
        """The senders of one block."""
        return (*(Node("head", layer, head) for head in range(self.n_heads)), Node("mlp", layer))

    def inputs_of(self, layer: int) -> tuple[Input, ...]:
        """The inputs of one block."""
        keys = [Input(slot, layer, head) for slot in "kv" for head in range(self.n_kv_heads)]
        return (*(Input("q", layer, head) for head in range(self.n_heads)), *keys, Input("mlp", layer))

    def index(self, sender: Node) -> int:
        """Its place among the senders."""
        if sender.kind == "embed":
            return 0
        return 1 + sender.layer * (self.n_heads + 1) + (self.n_heads if sender.kind == "mlp" else sender.head)

    def reach(self, receiver: Input) -> int:
        """How many senders, from the first on, an input reads."""
        if receiver.slot == "logits":
            return 1 + self.n_layers * (self.n_heads + 1)
        return 1 + receiver.layer * (self.n_heads + 1) + (self.n_heads if receiver.slot == "mlp" else 0)

    def inputs_to(self, node: Node) -> tuple[Input, ...]:
        """What a node reads: q, k and v of a head (k and v shared with its group), or its one input; none of embed."""
        if node.kind == "head":
            kv = node.head // self.group
            return tuple(Input(slot, node.layer, head) for slot, head in zip("qkv", (node.head, kv, kv), strict=True))
        return {"mlp": (Input("mlp", node.layer),), "logits": (LOGITS_IN,)}.get(node.kind, ())

    def nodes_at(self, receiver: Input) -> tuple[Node, ...]:
        """The nodes that an input belongs to: of k and v the whole query group."""
        if receiver.slot in ("mlp", "logits"):
            return (Node("mlp", receiver.layer) if receiver.slot == "mlp" else LOGITS,)
        first, n = (receiver.head, 1) if receiver.slot == "q" else (receiver.head * self.group, self.group)
        return tuple(Node("head", receiver.layer, head) for head in range(first, first + n))

    def node(self, name: str) -> Node:
        """The node of a name.

        Raises:
            UsageError: this model has no such node; names the nearest.
        """
        return self._among(name, "node", self._named_nodes)

    def input(self, name: str) -> Input:
        """The input of a name.

        Raises:
            UsageError: this model has no such input; names the nearest.
        """
        return self._among(name, "input", self._named_inputs)

    def edge(self, name: str) -> Edge:
        """The edge of a name.

        Raises:
            UsageError: this model has no such node or input, or the input lies before the sender.
        """
        sender, receiver = _halves(name)
        found = Edge(self.node(sender), self.input(receiver))
        if found.sender.kind == "logits" or self.index(found.sender) >= self.reach(found.receiver):
            raise UsageError(
                f"there is no edge {name!r}",
                why=f"{found.receiver.name} is read before {found.sender.name} has written",
                fix=f"name a sender before {found.receiver.name}",
            )
        return found

    def select(self, patterns: Iterable[str]) -> list[Edge]:
        """The edges of names, in which `*` and `?` stand for any characters on either side; each once, in the graph's order.

        Raises:
            UsageError: a name is unknown, or a pattern matches no edge.
        """
        found: set[Edge] = set()
        for pattern in patterns:
            if not set(pattern) & set("*?["):
                found.add(self.edge(pattern))
                continue
            sender, receiver = _halves(pattern)
            senders = [node for node in self.senders if fnmatchcase(node.name, sender)]
            readers = [one for one in self.inputs if fnmatchcase(one.name, receiver)]
            some = [Edge(a, b) for b in readers for a in senders if self.index(a) < self.reach(b)]
            if not some:
                raise UsageError(
                    f"no edge matches {pattern!r}",
                    why=f"{len(senders)} senders and {len(readers)} inputs match",
                    fix="name edges like a0.*->a1.kv0.k",
                )
            found.update(some)
        return sorted(found, key=self.order)

    def order(self, edge: Edge) -> tuple[int, int]:
        """What to sort edges by."""
        return self._places[edge.receiver], self.index(edge.sender)

    @cached_property
    def _places(self) -> dict[Input, int]:
        return {one: at for at, one in enumerate(self.inputs)}

    @cached_property
    def _named_nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _named_inputs(self) -> dict[str, Input]:
        return {one.name: one for one in self.inputs}

    def _among(self, name: str, word: str, known: dict[str, Any]) -> Any:
        if name not in known:
            sizes = f"{self.n_layers} layers of {self.n_heads} heads on {self.n_kv_heads} key-value heads"
            raise UsageError(f"unknown {word} {name!r}", why=f"the model has {sizes}", fix=did_you_mean(name, known))
        return known[name]


def graph(model: Sized) -> Graph:
    """The graph of a model."""
    return Graph(model.n_layers, model.n_heads, model.n_kv_heads)


def parse_node(name: str) -> Node:
    """Take a node's name apart; whether a model has it, `Graph.node` says.

    Raises:
        UsageError: it is no name of a node.
    """
    found = _NODE.fullmatch(name)
    if found is None:
        raise _malformed("node", name, ("embed", "a0.h0", "m0", "logits"))
    if found["head"] is not None:
        return Node("head", int(found["layer"]), int(found["head"]))
    return Node("mlp", int(found["mlp"])) if found["mlp"] is not None else EMBED if found["embed"] else LOGITS


def parse_input(name: str) -> Input:
    """Take an input's name apart; whether a model has it, `Graph.input` says.

    Raises:
        UsageError: it is no name of an input.
    """
    found = _INPUT.fullmatch(name)
    if found is None:
        raise _malformed("input", name, ("a0.h0.q", "a0.kv0.k", "a0.kv0.v", "m0.in", "logits.in"))
    if found["layer"] is not None:
        return Input(found["slot"] or "q", int(found["layer"]), int(found["q"] or found["kv"]))
    return Input("mlp", int(found["mlp"])) if found["mlp"] is not None else LOGITS_IN


def parse_edge(name: str) -> Edge:
    """Take an edge's name apart; whether a model has it, `Graph.edge` says.

    Raises:
        UsageError: it is no name of an edge.
    """
    sender, receiver = _halves(name)
    return Edge(parse_node(sender), parse_input(receiver))


def _halves(name: str) -> tuple[str, str]:
    sender, arrow, receiver = name.partition(ARROW)
    if not arrow:
        raise _malformed("edge", name, ("a0.h0->a1.kv0.k", "embed->m0.in", "m0->logits.in"))
    return sender.strip(), receiver.strip()


def _malformed(word: str, name: str, examples: tuple[str, ...]) -> UsageError:
    return UsageError(
        f"unknown {word} {name!r}", why=f"{word}s are called {', '.join(examples)}", fix=did_you_mean(name, examples)
    )
