"""One pass over all activations: how often, how strongly and where each latent fires.

The activations of a layer do not fit in memory, and neither do the latents of one shard; so whole windows are
encoded a few at a time and folded into sums (`sums`) behind, while the next ones are encoded. What is kept grows with
latents, documents and examples, not with tokens, and two passes over the same shards give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .best import AFTER, BEFORE, Fired, Kept
from .sample import Cofiring, Sample, cofiring, decile_examples
from .sums import BINS, LOWEST, POSITIONS, Frame, Near, Piece, Sums

__all__ = ["AFTER", "BEFORE", "BINS", "Directions", "FeatureTables", "bin_edges", "finished", "scan", "scan_means"]

_BUDGET = 2**21  # latents held at once on a CPU: few enough to stay in its cache, and for malloc to reuse
_DEVICE_BUDGET = 2**27  # elsewhere
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeatureTables:
    """What the pass found. L latents, D documents, K examples; special tokens (BOS…) count nowhere.

    Attributes:
        n_tokens: tokens that were read.
        fired: tokens on which a latent is above 0, int64 [L]; total, square: sums of its activations and of their
            squares, float64 [L].
        peak: largest activation, float32 [L].
        histogram: tokens by activation, int64 [L, BINS], over the bins of `bin_edges`.
        document_tokens: int64 [D]; document_total float64 [D, L] and document_fired int64 [D, L] are `total`
            and `fired` of each document; document_x_sum float64 [D, d_in] sums the raw activations.
        stretch_tokens: int64 [D, S] of each document's stretches (0 where it has fewer), stretch_total float32
            [D, S, L].
        token_count: int64 [B] tokens of each bucket of ids, token_total float64 [B, L]; token_own: share of tokens
            whose id shares its bucket with no other.
        position_count: int64 [P] tokens by half octave of the position, position_total float64 [P, L].
        top: float32 [L, K] etc., the strongest passages, one a window, none twice. Its `value` is the activation.
        deciles: passages of slot latent * 10 + decile of the range (0, peak], from a sample of windows.
        near: passages in which the latent is silent although the residual stream leans its way: `value` is the
            cosine of the centred activation to the latent's direction.
        cofiring: which latents fire on the same tokens, from a sample of windows.
    """

    n_tokens: int
    fired: Tensor
    total: Tensor
    square: Tensor
    peak: Tensor
    histogram: Tensor
    document_tokens: Tensor
    document_total: Tensor
    document_fired: Tensor
    document_x_sum: Tensor
    stretch_tokens: Tensor
    stretch_total: Tensor
    token_count: Tensor
    token_total: Tensor
    token_own: float
    position_count: Tensor
    position_total: Tensor
    top: Kept
    deciles: Kept
    near: Kept
    cofiring: Cofiring

    @property
    def document_means(self) -> np.ndarray:
        """Mean activation over a document's tokens, float64 [D, L]; 0 for a document without tokens."""
        return (self.document_total / self.document_tokens.clamp_min(1)[:, None]).numpy()

    @property
    def document_x_means(self) -> np.ndarray:
        """Mean raw activation over a document's tokens, float64 [D, d_in]; 0 for a document without tokens."""
        return (self.document_x_sum / self.document_tokens.clamp_min(1)[:, None]).numpy()


@dataclass(frozen=True)
class Directions:
    """Where near misses are looked for: unit rows [L, d_in], and the mean activation [d_in] that is taken off."""

    rows: Tensor
    centre: Tensor


def bin_edges() -> list[float]:
    """Lower edges of the histogram's bins."""
    return [2.0 ** (LOWEST + i / 2) for i in range(BINS)]


def scan(
    shards: Iterable[Mapping[str, Tensor]],
    encode: Encode,
    d_sae: int,
    document_of_window: Sequence[int],
    *,
    n_documents: int,
    special_ids: Sequence[int] = (),
    top_k: int = 10,
    device: str | torch.device = "cpu",
    directions: Directions | None = None,
    token_count: Tensor | None = None,
    said: Callable[[int], None] = lambda rows: None,
    sums: Sums | None = None,
    kept: Callable[[Sums], None] = lambda sums: None,
) -> FeatureTables:
    """Read every shard once.

    Args:
        shards: dicts with acts [rows, d_in], window, position, token int [rows]; a window's rows lie
            together, in order, within one shard.
        encode: [n, d_in] float32 on `device` -> latents [n, d_sae] >= 0.
        document_of_window: number of the document of each window.
        directions: on `device`; without them there are no near misses.
        token_count: how often each token id occurs, where there may be more ids than buckets.
        said: called with the number of rows read, a chunk at a time; it may raise to stop.
        sums: those of the shards before the first of `shards`, to go on with.
        kept: called after each shard with the sums up to and including it; what it saves may be given as `sums`.
    """
    frame = sums.frame if sums else Frame.of(d_sae, document_of_window, n_documents, top_k, token_count)
    with ThreadPoolExecutor(1, "folding") as pool:
        for shard in shards:
            waiting: Future[None] | None = None
            rows = _Rows(shard, special_ids)
            sums = sums or Sums(frame, rows.acts.shape[1])
            for first, last in _chunks(rows.window, _rows_at_once(device, d_sae)):
                piece = _encoded(rows, first, last, encode, device, directions, frame)
                if waiting is not None:
                    waiting.result()
                waiting = pool.submit(sums.add, piece)
                said(last - first)
            if waiting is not None:
                waiting.result()
            kept(sums)
            said(rows.left_out)
    return finished(sums or Sums(frame, 0))


def finished(sums: Sums) -> FeatureTables:
    """The tables of all that was added."""
    tables, frame = sums.tables, sums.frame
    d, n = frame.d_sae, frame.n_documents
    totals = tables["document_total"].view(n, d)
    fired = tables["document_fired"].view(n, d)
    n_tokens = int(tables["document_tokens"].sum())
    own = torch.zeros(len(tables["token_count"]), dtype=torch.bool)
    own[frame.bucket[frame.own]] = True
    sample: Sample = sums.sampler.sample()
    peak = tables["peak"]
    return FeatureTables(
        n_tokens=n_tokens,
        fired=fired.sum(dim=0),
        total=totals.sum(dim=0),
        square=tables["square"],
        peak=peak,
        histogram=tables["histogram"].view(d, BINS),
        document_tokens=tables["document_tokens"],
        document_total=totals,
        document_fired=fired,
        document_x_sum=tables["document_x_sum"],
        stretch_tokens=tables["stretch_tokens"].view(n, frame.stretches),
        stretch_total=tables["stretch_total"].view(n, frame.stretches, d),
        token_count=tables["token_count"],
        token_total=tables["token_total"].view(-1, d),
        token_own=float(tables["token_count"][own].sum()) / max(n_tokens, 1),
        position_count=tables["position_count"],
        position_total=tables["position_total"].view(POSITIONS, d),
        top=sums.top.kept(),
        deciles=decile_examples(sample, peak.numpy()),
        near=sums.near.kept(),
        cofiring=cofiring(sample, d),
    )


def scan_means(
    shards: Iterable[Mapping[str, Tensor]],
    encoders: Mapping[str, Encode],
    sizes: Mapping[str, int],
    document_of_window: Sequence[int],
    *,
    n_documents: int,
    special_ids: Sequence[int] = (),
    device: str | torch.device = "cpu",
    said: Callable[[int], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """Activations of several SAEs summed a document, in one pass: name -> float64 [n_documents, d_sae].

    Args:
        encoders: name -> encode, as in `scan`; sizes: name -> d_sae.
    """
    owner = torch.tensor(list(document_of_window), dtype=torch.int64)
    totals = {name: torch.zeros(n_documents * d, dtype=torch.float64) for name, d in sizes.items()}
    for shard in shards:
        rows = _Rows(shard, special_ids)
        for first, last in _chunks(rows.window, _rows_at_once(device, max(sizes.values(), default=1))):
            x = rows.acts[first:last].to(device, torch.float32)
            document = owner[rows.window[first:last]]
            for name, encode in encoders.items():
                fired = _fired(encode(x))
                cell = document[torch.from_numpy(fired.row)] * sizes[name] + torch.from_numpy(fired.latent)
                totals[name].index_add_(0, cell, torch.from_numpy(fired.value).double())
            said(last - first)
        said(rows.left_out)
    return {name: total.view(n_documents, sizes[name]) for name, total in totals.items()}


class _Rows:
    """A shard's rows without special tokens."""

    def __init__(self, shard: Mapping[str, Tensor], special_ids: Sequence[int]) -> None:
        special = torch.tensor(list(special_ids), dtype=torch.int64)
        keep = ~torch.isin(shard["token"].long(), special)
        self.acts = shard["acts"][keep]
        self.window, self.position, self.token = (shard[n][keep].long() for n in ("window", "position", "token"))
        self.left_out = len(keep) - len(self.acts)


def _rows_at_once(device: str | torch.device, d_sae: int) -> int:
    budget = _BUDGET if torch.device(device).type == "cpu" else _DEVICE_BUDGET
    return max(1, budget // d_sae)


def _chunks(window: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges of whole windows with about `rows` rows (never less than one window)."""
    ends = torch.unique_consecutive(window, return_counts=True)[1].cumsum(0).tolist()
    first = 0
    for here, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - first > rows:
            yield first, here
            first = here


@torch.no_grad()
def _encoded(
    rows: _Rows,
    first: int,
    last: int,
    encode: Encode,
    device: str | torch.device,
    directions: Directions | None,
    frame: Frame,
) -> Piece:
    """Rows first to last, which are whole windows, ready to be folded."""
    x = rows.acts[first:last].to(device, torch.float32)
    latents = encode(x)
    window = rows.window[first:last]
    windows, counts = torch.unique_consecutive(window, return_counts=True)
    parts = x.split(counts.tolist())
    x_sum = torch.stack([part.double().sum(dim=0) for part in parts]).cpu()
    near = None
    if directions is not None:
        near = _near(latents, x, windows, counts, directions, frame)
    return Piece(
        _fired(latents), window, rows.position[first:last], rows.token[first:last], windows, counts, x_sum, near
    )


def _fired(latents: Tensor) -> Fired:
    """The entries above 0; numbers that fit where they came from."""
    flat, d_sae = latents.reshape(-1), latents.shape[1]
    above = flat > 0
    # NumPy looks for true bytes several times faster than PyTorch does on a CPU
    place = above.nonzero().squeeze(1) if above.is_cuda else torch.from_numpy(np.flatnonzero(above.cpu().numpy()))
    value = flat[place.to(flat.device)].float().cpu()
    row, latent = np.divmod(place.cpu().numpy(), d_sae)
    return Fired(row, latent, value.numpy(), d_sae)


def _near(
    latents: Tensor, x: Tensor, windows: Tensor, counts: Tensor, directions: Directions, frame: Frame
) -> Near | None:
    """For some windows, where each latent is silent for a passage's length and the activation closest to it."""
    ends = counts.cumsum(0)
    chosen = (windows % frame.near_stride == 0).nonzero().squeeze(1).tolist()
    cosines, rows = [], []
    for i in chosen:
        start, end = int(ends[i] - counts[i]), int(ends[i])
        centred = torch.nn.functional.normalize(x[start:end] - directions.centre, dim=1)
        fires = torch.nn.functional.pad((latents[start:end] > 0).int().cumsum(dim=0), (0, 0, 1, 0))
        at = torch.arange(end - start, device=x.device)
        before, after = (at - BEFORE).clamp_min(0), (at + AFTER + 1).clamp_max(end - start)
        loud = fires[after] > fires[before]
        best = (centred @ directions.rows.T).masked_fill_(loud, -3.0).max(dim=0)
        cosines.append(best.values.float().cpu().numpy())
        rows.append(start + best.indices.cpu().numpy())
    if not chosen:
        return None
    return Near(windows[chosen].numpy(), np.stack(cosines), np.stack(rows))
