"""What every sender adds to the stream, in the run that is patched and in the one that values come from.

A head adds its z through its block of the output projection, an MLP its output, the embedding its row; what the
projection's bias adds is the same in both runs and belongs to nobody. Heads are kept as z, which is as small as the
stream itself, and put through the projection only when somebody asks what they add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ..errors import UsageError
from .graph import Graph, Node
from .pairs import EncodedPair
from .runs import CLEAN, Group, Patchable, ends, prepare
from .sites import Plain
from .sources import Source, make_source

if TYPE_CHECKING:
    from .graph import Input

__all__ = ["Senders", "Sources", "Splittable", "Writes", "edge_group", "make_sources", "senders_of", "stream_site"]


class Splittable(Patchable, Protocol):
    """What edges need of `greatctl.model.FrozenModel` besides what a sweep does."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int

    def head_outputs(self, layer: int, z: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor: ...

    def head_values(
        self,
        layer: int,
        streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        heads: Sequence[int],
        *,
        start: int = 0,
        past: Any = None,
    ) -> torch.Tensor: ...

    def mlp_values(self, layer: int, stream: torch.Tensor) -> torch.Tensor: ...


class Sources(NamedTuple):
    """What takes the place of the corrupted run's values in an ablation: of the embedding, of z, and of the MLPs."""

    embed: Source
    z: Source
    mlp: Source


@dataclass(frozen=True)
class Writes:
    """What the senders of b runs hold.

    Attributes:
        embed: [b, p, d_model].
        z: per layer [b, p, n_heads, d_head].
        mlp: per layer [b, p, d_model].
    """

    embed: torch.Tensor
    z: Sequence[torch.Tensor]
    mlp: Sequence[torch.Tensor]


class Senders:
    """One branch of a group in one direction.

    Args:
        model: the frozen model.
        graph: its graph.
        base: what the senders of the patched run hold.
        other: the values to take, in the positions of the patched run; its own where there is none to take.
        streams: the patched run's stream: entering each block, in the middle of each, and at the end.
    """

    def __init__(
        self, model: Splittable, graph: Graph, base: Writes, other: Writes, streams: dict[str, torch.Tensor]
    ) -> None:
        self._model, self._graph, self.base, self.other, self.streams = model, graph, base, other, streams
        self.length = base.embed.shape[1]

    def stream(self, receiver: Input) -> torch.Tensor:
        """What an input reads in the patched run, [b, p, d_model]."""
        return self.streams[stream_site(receiver, self._graph)]

    def entering(self, layer: int) -> torch.Tensor:
        """The stream that enters a block in the patched run, [b, p, d_model]."""
        return self.streams[f"blocks.{layer}.hook_resid_pre"]

    def moves(self) -> torch.Tensor:
        """[b, p, senders] bool: where a sender differs between the runs."""
        columns = [(self.other.embed != self.base.embed).any(-1, keepdim=True)]
        for layer in range(self._graph.n_layers):
            columns.append((self.other.z[layer] != self.base.z[layer]).any(-1))
            columns.append((self.other.mlp[layer] != self.base.mlp[layer]).any(-1, keepdim=True))
        return torch.cat(columns, dim=-1)

    def change(self, nodes: Sequence[Node], rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """How much more than in the patched run each of n senders adds in the other, [n, p - start, d_model] in at
        least float32.

        Args:
            nodes: n senders.
            rows: the pair of each [n].
            start: the first position wanted.
        """
        size = (len(nodes), self.length - start, self.base.embed.shape[-1])
        found = torch.zeros(size, dtype=_wide(self.base.embed), device=self.base.embed.device)
        alike: dict[tuple[str, int], list[int]] = {}
        for at, node in enumerate(nodes):
            alike.setdefault((node.kind, node.layer), []).append(at)
        for (kind, layer), places in alike.items():
            where = torch.tensor(places, device=found.device)
            if kind == "head":
                heads = sorted({nodes[at].head for at in places})
                each = self.heads(layer, heads, slice(None), start)
                column = torch.tensor([heads.index(nodes[at].head) for at in places], device=found.device)
                found[where] = each[rows[where], :, column]
            else:
                own, other = self._whole(kind, layer)
                found[where] = _less(other[rows[where], start:], own[rows[where], start:])
        return found

    def heads(self, layer: int, heads: Sequence[int] | None, rows: slice, start: int = 0) -> torch.Tensor:
        """The changes of some heads of a layer, [b, p - start, n, d_model] in at least float32."""
        cut = (rows, slice(start, None), slice(None) if heads is None else list(heads))
        return self._model.head_outputs(layer, _less(self.other.z[layer][cut], self.base.z[layer][cut]), heads)

    def totals(self, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """For each place of the stream, the sum of the changes of all senders before it, [b, p, d_model] in at least
        float32: what the other run's stream has more than the patched one's."""
        total = _less(self.other.embed[rows], self.base.embed[rows])
        found: dict[str, torch.Tensor] = {}
        for layer in range(self._graph.n_layers):
            found[f"blocks.{layer}.hook_resid_pre"] = total
            for head in range(self._graph.n_heads):
                total = total + self.heads(layer, [head], rows)[:, :, 0]
            found[f"blocks.{layer}.hook_resid_mid"] = total
            total = total + _less(self.other.mlp[layer][rows], self.base.mlp[layer][rows])
        found[f"blocks.{self._graph.n_layers - 1}.hook_resid_post"] = total
        return found

    def _whole(self, kind: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if kind == "embed":
            return self.base.embed, self.other.embed
        return self.base.mlp[layer], self.other.mlp[layer]


def stream_site(receiver: Input, graph: Graph) -> str:
    """The place of the stream that an input reads."""
    if receiver.slot == "logits":
        return f"blocks.{graph.n_layers - 1}.hook_resid_post"
    return f"blocks.{receiver.layer}.hook_resid_{'mid' if receiver.slot == 'mlp' else 'pre'}"


def edge_group(model: Splittable, pairs: Sequence[EncodedPair], *, sources: Sources | None = None) -> Group:
    """Pairs of the same two lengths, prepared for edges and masked runs.

    Args:
        model: the frozen model.
        pairs: b pairs.
        sources: what replaces the corrupted run's values in an ablation.
    """
    return prepare(model, pairs, Plain("resid_pre"), layers=[0], source=None if sources is None else sources.embed)


def make_sources(model: Splittable, pairs: Sequence[EncodedPair], kind: str, *, seed: int = 0) -> Sources | None:
    """What replaces the corrupted run's values: None for `counterpart`, else that of `zero`, `mean` or `resample`.

    Args:
        model: the frozen model.
        pairs: all pairs, not those of one group alone; see `sources.make_source`.
        kind: the corruption.
        seed: of the draws of `resample`.
    """
    if kind == "counterpart":
        return None
    layers = range(model.n_layers)
    embed = make_source(model, pairs, Plain("resid_pre"), [0], kind, seed=seed)
    z, mlp = (make_source(model, pairs, Plain(site), layers, kind, seed=seed) for site in ("z", "mlp_out"))
    return Sources(embed, z, mlp)


@torch.no_grad()
def senders_of(
    model: Splittable, graph: Graph, group: Group, number: int, direction: str, sources: Sources | None = None
) -> Senders:
    """The senders of branch `number` of a group.

    Args:
        model: the frozen model.
        graph: its graph.
        group: of `edge_group`, with the same sources.
        number: which branch.
        direction: `denoising` or `noising`.
        sources: what replaces the corrupted run's values; then the clean run is the one that is patched.

    Raises:
        UsageError: the group was prepared with other sources, or an ablation is to be patched.
    """
    base, source = ends(direction)
    kind = "counterpart" if sources is None else sources.z.kind
    if group.corruption != kind or (sources is not None and base != CLEAN):
        raise UsageError(
            f"edges cannot be taken from {kind} values here",
            why=f"the group holds {group.corruption} values, and the direction is {direction}",
            fix="prepare the group with the same sources; an ablation is noising",
        )
    tokens = group.branches[number].tokens
    kinds = ("attn.hook_z", "hook_mlp_out")
    sites = [f"blocks.{layer}.{kind}" for layer in range(graph.n_layers) for kind in kinds]
    places = [f"blocks.{layer}.hook_resid_{at}" for layer in range(graph.n_layers) for at in ("pre", "mid")]
    places.append(f"blocks.{graph.n_layers - 1}.hook_resid_post")
    found = model.capture(tokens[base], [*sites, *places])
    own = _writes(found, graph)
    if sources is not None:
        other = _ablated(model, group, own, sources)
    else:
        other = _aligned(
            own, _writes(model.capture(tokens[source], [*sites, places[0]]), graph), group, number, direction
        )
    return Senders(model, graph, own, other, {place: found[place] for place in places})


def _writes(found: dict[str, Any], graph: Graph) -> Writes:
    layers = range(graph.n_layers)
    z, mlp = ([found[f"blocks.{layer}.{kind}"] for layer in layers] for kind in ("attn.hook_z", "hook_mlp_out"))
    return Writes(found["blocks.0.hook_resid_pre"], z, mlp)


def _aligned(own: Writes, other: Writes, group: Group, number: int, direction: str) -> Writes:
    """The other run's values at the corresponding positions, and the run's own where there is none."""
    if group.aligned:
        return other
    match = group.match(direction, number)
    row = torch.arange(len(match), device=match.device)[:, None]
    return _joined(own, other, lambda mine, theirs: (theirs[row, match.clamp_min(0)], match >= 0))


def _ablated(model: Splittable, group: Group, own: Writes, sources: Sources) -> Writes:
    """An ablation's values in the positions of the clean run."""
    made, there = {}, None
    for source, site, values in zip(sources, ("resid_pre", "z", "mlp_out"), ([own.embed], own.z, own.mlp), strict=True):
        runs = {layer: (value, value) for layer, value in enumerate(values)}
        made[site], there = source.values(model, group.pairs, Plain(site), runs)
    ready = Writes(made["resid_pre"][0], list(made["z"].values()), list(made["mlp_out"].values()))
    return _joined(own, ready, lambda mine, theirs: (theirs.to(mine.dtype), there))


def _joined(own: Writes, other: Writes, choose: Callable[[Any, Any], tuple[Any, Any]]) -> Writes:
    def join(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        values, there = choose(mine, theirs)
        return torch.where(there.reshape(*there.shape, *[1] * (mine.ndim - 2)), values, mine)

    z, mlp = ([join(a, b) for a, b in zip(x, y, strict=True)] for x, y in ((own.z, other.z), (own.mlp, other.mlp)))
    return Writes(join(own.embed, other.embed), z, mlp)


def _less(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b in at least float32: in half precision a small difference would lose what is left of it."""
    return a.to(_wide(a)) - b.to(_wide(b))


def _wide(value: torch.Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
