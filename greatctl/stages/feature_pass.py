"""The pass over harvested activations that all feature tables come from, resumable.

    feature_pass           one SAE: everything of `FeatureTables`
    control_means          several SAEs at once: sums a document, nothing else
    write_feature_tables   the tables below results/features/<name>/, as `greatctl.features.write` says

While it reads, its sums are saved every so many seconds in the folder `pass` of the work folder, always at the end of a
shard, so that a stop or a kill loses no more than that and the end is the same to the byte. Where saving takes long
(they may be several hundred MB) it is done more seldom, so that it stays a small part of the time and of what the disk
bears. `seal(discard=(PASS,))` removes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..store.artifact import Artifact
from .context import Context

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpus.windows import TokenStore
    from ..features.sums import Frame, Sums
    from ..features.tables import Directions, FeatureTables
    from ..model.interface import FrozenModel
    from ..sae.folder import LoadedSAE
    from ..store.shards import ShardReader

__all__ = ["PASS", "control_means", "feature_pass", "write_feature_tables"]

PASS = "pass"
_STATE = "sums.safetensors"
_EVERY = 20.0  # seconds between two savings
_SHARE = 30  # and at least so many times what a saving takes


def feature_pass(
    ctx: Context,
    sae: LoadedSAE,
    activations: Artifact,
    store: TokenStore,
    folder: Path,
    *,
    examples: int = 10,
    device: str = "cpu",
    every: float = _EVERY,
) -> FeatureTables:
    """Read the activations once with one SAE.

    Args:
        sae: on `device`; it reads the width of the activations.
        store: the tokens that the activations were made from.
        folder: the work folder, of one identity, in which the pass goes on where it was stopped.
        examples: strongest passages kept of each latent.
        every: seconds between two savings.

    Raises:
        InterruptedRun: a stop was asked for; what was saved stays.
    """
    from ..features.sums import Frame
    from ..features.tables import scan
    from ..store.shards import ShardReader

    reader = ShardReader(activations.path)
    count = store.input_ids.flatten().bincount(minlength=int(store.tokenizer["vocab_size"]))
    documents = store.windows["document"]
    frame = Frame.of(sae.d_sae, documents, len(store.documents), examples, count)
    saved = _Saved(folder / PASS / _STATE, frame, reader, every)
    first, sums = saved.read(sae.d_in)
    return scan(
        saved.shards(first),
        sae.encode,
        sae.d_sae,
        documents,
        n_documents=len(store.documents),
        special_ids=store.tokenizer["special_ids"],
        top_k=examples,
        device=device,
        directions=_directions(sae, activations, device),
        token_count=count,
        said=_said(ctx, reader, first),
        sums=sums,
        kept=saved.keep,
    )


def control_means(
    ctx: Context,
    saes: Mapping[str, LoadedSAE],
    activations: Artifact,
    store: TokenStore,
    *,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Sums of several SAEs' latents a document, in one pass: name -> float64 [n_documents, d_sae].

    Divide by `FeatureTables.document_tokens` for means.
    """
    from ..features.tables import scan_means
    from ..store.shards import ShardReader

    reader = ShardReader(activations.path)
    return scan_means(
        reader,
        {name: sae.encode for name, sae in saes.items()},
        {name: sae.d_sae for name, sae in saes.items()},
        store.windows["document"],
        n_documents=len(store.documents),
        special_ids=store.tokenizer["special_ids"],
        device=device,
        said=_said(ctx, reader, 0, task="companions"),
    )


def write_feature_tables(
    ctx: Context,
    folder: Path,
    tables: FeatureTables,
    store: TokenStore,
    sae: LoadedSAE,
    model: FrozenModel,
    *,
    unit: str,
    alive: Sequence[int],
) -> None:
    """Write latents, examples, units and stretches (see `greatctl.features.write`).

    Args:
        model: with all its blocks, for what latents write.
        unit: the document column that names the unit (`author` or `unit`).
        alive: latents that fire.
    """
    from ..features.examples import Decoder
    from ..features.logits import latent_logits
    from ..features.write import Corpus, write_stretches, write_tables, write_units

    corpus = Corpus(store.input_ids, store.token_end, store.length, store.documents, store.windows["document"])
    decoder = Decoder(model.tokenizer, store.tokenizer["special_ids"])
    # an SAE whose width is not the residual stream's has nothing to do with the vocabulary
    logits = latent_logits(model, sae.W_dec, hidden=model.special_ids) if sae.d_out == model.d_model else None
    ctx.run.stop_here()
    write_tables(folder, tables, corpus, decoder, logits, directions=sae.W_dec)
    ctx.run.stop_here()
    write_units(folder, tables, store.documents, unit, alive)
    write_stretches(folder, tables, store.documents, alive)


def _directions(sae: LoadedSAE, activations: Artifact, device: str) -> Directions | None:
    """The decoder rows and the activations' mean; None for a transcoder, whose rows live elsewhere."""
    from safetensors.torch import load_file
    from torch.nn.functional import normalize

    from ..features.tables import Directions

    stats = activations.path / "stats.safetensors"
    if sae.d_out != sae.d_in or sae.target_hook_point not in (None, sae.hook_point):
        return None
    mean = load_file(stats)["mean"].float() if stats.is_file() else sae.W_dec.new_zeros(sae.d_in)
    return Directions(normalize(sae.W_dec.detach().float(), dim=1).to(device), mean.to(device))


class _Said:
    """Progress over all rows, and stopping."""

    def __init__(self, ctx: Context, task: str, total: int, already: int) -> None:
        self._ctx, self._task, self._total, self._already, self._done = ctx, task, total, already, already

    def __call__(self, rows: int) -> None:
        self._done += rows
        self._ctx.run.progress(self._task, self._done, self._total, "tokens", already=self._already)
        self._ctx.run.stop_here()


def _said(ctx: Context, reader: ShardReader, first: int, task: str = "interpret") -> _Said:
    return _Said(ctx, task, reader.rows, sum(entry.rows for entry in reader.entries[:first]))


class _Saved:
    """The sums on disk: how many shards they hold, and the tensors."""

    def __init__(self, path: Path, frame: Frame, reader: ShardReader, every: float) -> None:
        self._path, self._frame, self._reader, self._every = path, frame, reader, every
        self._done, self._last = 0, time.monotonic()

    def read(self, d_in: int) -> tuple[int, Sums | None]:
        """The shard to go on with, and the sums so far; (0, None) where nothing usable was saved."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        from ..features.sums import Sums

        try:
            state = load(self._path.read_bytes())
            self._done = int(state.pop("shards"))
            sums = Sums(self._frame, d_in)
            sums.restore(state)
        except (OSError, SafetensorError, KeyError):
            self._done = 0
            return 0, None
        return self._done, sums

    def shards(self, first: int) -> Iterator[Mapping[str, Tensor]]:
        """Shards from `first` on."""
        return (self._reader.read(number) for number in range(first, len(self._reader.entries)))

    def keep(self, sums: Sums) -> None:
        """Note that a shard more is in the sums; save them when it is time."""
        import torch
        from safetensors.torch import save

        from ..store.files import write_bytes

        self._done += 1
        started = time.monotonic()
        if started - self._last < self._every:
            return
        state = {name: tensor.contiguous() for name, tensor in sums.state().items()}
        write_bytes(self._path, save({**state, "shards": torch.tensor(self._done)}))
        self._last = time.monotonic()
        self._every = max(self._every, _SHARE * (self._last - started)) if self._every else 0.0
