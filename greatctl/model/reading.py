"""Windows in, rows of activations out: the inner loop of harvest.

A row is one real token (padding is dropped, BOS kept). Windows of one shard are read longest first, so that a batch
holds windows of like length and hardly any padding; the rows are put back in the order of the windows. Sums for the
mean, the mean norm and the variance are taken over text tokens alone.

On a GPU nothing waits: while a batch is computed, the rows of the one before travel to the host on a stream of their
own, together with their sums (float32 within a batch, float64 across batches). On the CPU the sums are taken in
float64 over the finished shard, so that not even the batch size shows in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import IntegrityError, ResourceError
from .interface import FrozenModel

__all__ = ["SUMS", "BatchSize", "Shard", "auto_batch", "begin", "read"]

Shard = dict[str, dict[str, torch.Tensor]]
"""Per site: acts [rows, d], window, position, token int32 [rows], sum float64 [d], norm_sum and sq_sum float64 [1]."""

SUMS = ("sum", "norm_sum", "sq_sum")
_TOKENS_A_PASS = {"cuda": 16384}  # past this an H100's products get no faster
_TOKENS_ELSEWHERE = 4096
_CHUNK = 4096  # rows summed at once in float64


def auto_batch(device: torch.device, window: int) -> int:
    """Windows a forward pass, where nobody chose: enough tokens to keep the device busy."""
    return max(1, _TOKENS_A_PASS.get(device.type, _TOKENS_ELSEWHERE) // window)


@dataclass
class BatchSize:
    """Windows a forward pass; halved, for good, when memory runs out."""

    windows: int
    said: Callable[[str], None] = lambda words: None

    def halve(self) -> None:
        """Go on with half.

        Raises:
            ResourceError: it is one window already.
        """
        if self.windows == 1:
            raise ResourceError(
                "the device's memory does not hold one window",
                why="the forward pass of a single window ran out of memory",
                fix="use shorter windows, --device cpu, or fewer hook points at once",
                code="out-of-memory",
            )
        self.windows = -(-self.windows // 2)
        self.said(f"memory ran out; going on with {self.windows} windows a pass")


def read(
    frozen: FrozenModel,
    input_ids: torch.Tensor,
    length: torch.Tensor,
    span: range,
    sites: Sequence[str],
    *,
    dtype: str,
    batch_size: BatchSize | int,
    shard: int = 0,
    said: Callable[[int], None] = lambda rows: None,
) -> Shard:
    """Activations of the windows `span`; see `begin`."""
    return begin(frozen, input_ids, length, span, sites, dtype=dtype, batch_size=batch_size, shard=shard, said=said)()


def begin(
    frozen: FrozenModel,
    input_ids: torch.Tensor,
    length: torch.Tensor,
    span: range,
    sites: Sequence[str],
    *,
    dtype: str,
    batch_size: BatchSize | int,
    shard: int = 0,
    said: Callable[[int], None] = lambda rows: None,
) -> Callable[[], Shard]:
    """Read the windows `span`; returns what waits for the last rows and hands out the shard.

    So that a GPU never waits between two shards, call that behind, while the next shard has begun.

    Args:
        input_ids: int32 [n_windows, window], right-padded; length: int32 [n_windows], real tokens.
        dtype: stored precision. Batches are cut from `span` alone, so they do not depend on other shards.
        batch_size: windows a pass; a `BatchSize` is halved here, for later calls too, when memory runs out.
        shard: named in errors.
        said: called after each batch with the rows read so far.

    Raises (also from what is returned):
        IntegrityError: a value is NaN or infinite; names shard, window and position.
        ResourceError: memory does not hold a single window.
    """
    batch = BatchSize(batch_size) if isinstance(batch_size, int) else batch_size
    lengths = length[span.start : span.stop].long()
    real = torch.arange(input_ids.shape[1])[None, :] < lengths[:, None]
    window, position = real.nonzero(as_tuple=True)
    token = input_ids[span.start : span.stop][real]
    where = {"window": (window + span.start).int(), "position": position.int(), "token": token.int()}
    special = torch.tensor(frozen.special_ids, dtype=torch.int32)
    page = _Page(where, ~torch.isin(where["token"], special), getattr(torch, dtype), shard)
    order = lengths.argsort(descending=True, stable=True)
    first = lengths.cumsum(0) - lengths  # a window's first row
    waiting: list[_Parcel] = []
    at = done = 0
    while at < len(order):
        chosen = order[at : at + batch.windows]
        try:
            sent = _pass(frozen, input_ids, lengths, chosen + span.start, chosen, first, sites, page)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            sent = None
        if sent is None:  # outside the handler, which would hold on to the pass's tensors
            _release(frozen.device)
            batch.halve()
            continue
        for parcel in waiting:
            page.put(parcel)
        waiting, at = sent, at + len(chosen)
        done += int(lengths[chosen].sum())
        said(done)
    return partial(page.complete, waiting)


@dataclass(frozen=True)
class _Parcel:
    """Rows of one site on their way to the host: `acts` [n, d] are the rows `rows` of the shard once `arrived`.

    `sums` float32 [d + 3] holds, over text rows, the sum, the sum of norms and of squared norms, and the squared
    norms of all rows; None where the sums are taken later.
    """

    site: str
    rows: torch.Tensor
    acts: torch.Tensor
    sums: torch.Tensor | None
    arrived: Callable[[], object]


def _pass(
    frozen: FrozenModel,
    input_ids: torch.Tensor,
    lengths: torch.Tensor,
    windows: torch.Tensor,
    chosen: torch.Tensor,
    first: torch.Tensor,
    sites: Sequence[str],
    page: _Page,
) -> list[_Parcel]:
    """Start one forward pass of `windows` (numbers in input_ids; `chosen` in the shard), one parcel a site."""
    longest = int(lengths[chosen].max())
    tokens = input_ids[windows, :longest].long()
    at = torch.arange(longest)[None, :]
    real = at < lengths[chosen][:, None]
    rows = (first[chosen][:, None] + at)[real]
    found = frozen.capture(_to(tokens, frozen.device), sites)
    flat = None if real.all() else _to(real.flatten().nonzero()[:, 0], frozen.device)
    text = _to(page.text[rows], frozen.device)
    parcels = []
    for site in sites:
        acts = found[site].flatten(2).flatten(0, 1)
        acts = (acts if flat is None else acts.index_select(0, flat)).to(page.dtype)
        parcels.append(_parcel(site, rows, acts, text))
    return parcels


def _parcel(site: str, rows: torch.Tensor, acts: torch.Tensor, text: torch.Tensor) -> _Parcel:
    """Send rows home: at once, or from a GPU on a stream beside the one that computes."""
    if acts.device.type != "cuda":
        return _Parcel(site, rows, acts.cpu(), None, lambda: None)
    exact = acts.float()
    squares = exact.square().sum(-1)
    kept = squares.where(text, 0)
    texts = exact.where(text[:, None], 0).sum(0)
    sums = torch.cat([texts, torch.stack([kept.sqrt().sum(), kept.sum(), squares.sum()])])
    stream = _copy_stream(acts.device)
    stream.wait_stream(torch.cuda.current_stream(acts.device))
    with torch.cuda.stream(stream):
        home = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (acts, sums)]
        for there, here in zip(home, (acts, sums), strict=True):
            there.copy_(here, non_blocking=True)
            here.record_stream(stream)
        event = stream.record_event()
    return _Parcel(site, rows, home[0], home[1], event.synchronize)


class _Page:
    """The rows of one shard as they come in."""

    def __init__(self, where: dict[str, torch.Tensor], text: torch.Tensor, dtype: torch.dtype, shard: int) -> None:
        self.where, self.text, self.dtype, self.shard = where, text, dtype, shard
        self._acts: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def put(self, parcel: _Parcel) -> None:
        """Take in a parcel, once it has arrived.

        Raises:
            IntegrityError: one of its values is not finite.
        """
        parcel.arrived()
        width = parcel.acts.shape[1]
        if parcel.site not in self._acts:
            self._acts[parcel.site] = torch.empty(len(self.text), width, dtype=self.dtype)
        acts, rows = self._acts[parcel.site], parcel.rows
        start, stop = int(rows[0]), int(rows[-1]) + 1
        if stop - start == len(rows):  # windows of one length stay together
            acts[start:stop] = parcel.acts
        else:
            acts[rows] = parcel.acts
        sums = parcel.sums
        if sums is None or not sums.isfinite().all():  # float32 squares overflow earlier than the values do
            self._check_finite(parcel)
            sums = None if sums is None else _moments(parcel.acts, self.text[rows])
        if sums is not None:
            sums = sums[: width + 2].double()
            self._sums[parcel.site] = self._sums[parcel.site] + sums if parcel.site in self._sums else sums

    def complete(self, waiting: Sequence[_Parcel]) -> Shard:
        """What the shard holds, once the last parcels have arrived."""
        for parcel in waiting:
            self.put(parcel)
        found: Shard = {}
        for site, acts in self._acts.items():
            sums = self._sums.get(site)
            sums = _moments(acts, self.text) if sums is None else sums
            parts = sums.split([acts.shape[1], 1, 1])
            where = {name: rows.clone() for name, rows in self.where.items()}
            found[site] = {"acts": acts, **where, **{k: v.clone() for k, v in zip(SUMS, parts, strict=True)}}
        return found

    def _check_finite(self, parcel: _Parcel) -> None:
        finite = parcel.acts.isfinite().all(-1)
        if finite.all():
            return
        row = int(parcel.rows[~finite].min())
        window, position, token = (int(values[row]) for values in self.where.values())
        raise IntegrityError(
            f"the activation at {parcel.site} is not finite: shard {self.shard}, window {window}, position {position}",
            why=f"token {token} gave NaN or infinity in {str(self.dtype).removeprefix('torch.')}",
            fix="use --dtype float32; if it stays, the model's weights are broken",
            code="not-finite",
        )


def _moments(acts: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """float64 [d + 2] over the text rows of acts [n, d]: their sum, sum of norms and sum of squared norms."""
    total = torch.zeros(acts.shape[1] + 2, dtype=torch.float64)
    for rows in _chunks(acts, text):
        squares = rows.square().sum(-1)
        total += torch.cat([rows.sum(0), torch.stack([squares.sqrt().sum(), squares.sum()])])
    return total


def _chunks(acts: torch.Tensor, text: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, len(acts), _CHUNK):
        yield acts[start : start + _CHUNK][text[start : start + _CHUNK]].double()


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which rows travel."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Onto the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
