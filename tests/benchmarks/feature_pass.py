"""The feature pass beside the model's own forward: tokens a second, overhead, peak memory.

    python tests/benchmarks/feature_pass.py                           # bundled model, its sample texts, an untrained SAE
    python tests/benchmarks/feature_pass.py --d-sae 4096 --k 64 --arch topk --rows 200000
    python tests/benchmarks/feature_pass.py --corpus PROJECT          # the rows, tokens and SAE of a project, whole

Floor: the bundled model's forward over whole windows, logits included, in batches as harvest makes them. Beside it the
capture that harvest does (it stops at the hook point), the SAE's encoding alone, and the pass: encoding, every table, and
the saving of its sums. The overhead is the pass's seconds a token over the forward's. CPU seconds are printed as well, since
a busy machine spoils the clock.

Without --corpus rounds are interleaved, and the best of each counts. With --corpus the pass runs once, and the others are
timed on a sample, windows spread evenly over the corpus: before the pass, in the middle of it (which waits meanwhile) and
after it. Their mean counts, and how far the forward's three rounds are apart is said. The peak of memory is that of the
pass alone, where Linux lets one see it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from greatctl.corpus.windows import TokenStore
from greatctl.extend.manager import load_plugins
from greatctl.model.loading import load as load_model
from greatctl.reference import model_dir
from greatctl.sae.folder import LoadedSAE, Origin
from greatctl.sae.folder import load as load_sae
from greatctl.sae.folder import save as save_sae
from greatctl.stages.feature_pass import feature_pass
from greatctl.store.artifact import newest
from greatctl.store.shards import ShardReader, ShardWriter

WINDOW, BATCH, SHARD = 256, 16, 256
SITE = "blocks.4.hook_resid_post"


@dataclass
class Way:
    """One row of the table."""

    name: str
    go: Callable[[], int]
    rounds: list[tuple[float, float, int]] = field(default_factory=list)  # seconds, CPU seconds, tokens

    def run(self, away: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)) -> None:
        """Once. `away`: (seconds, CPU seconds) meanwhile that were spent on something else."""
        clock, cpu = time.perf_counter(), time.process_time()
        tokens = self.go()
        seconds, busy = time.perf_counter() - clock, time.process_time() - cpu
        lost = away()
        self.rounds.append((seconds - lost[0], busy - lost[1], tokens))

    def best(self) -> tuple[float, float]:
        """Microseconds and CPU microseconds a token of the best round."""
        return min(1e6 * s / n for s, _, n in self.rounds), min(1e6 * c / n for _, c, n in self.rounds)

    def mean(self) -> tuple[float, float]:
        """The same of all rounds together."""
        seconds, cpu, tokens = (sum(column) for column in zip(*self.rounds, strict=True))
        return 1e6 * seconds / tokens, 1e6 * cpu / tokens


@dataclass(frozen=True)
class Corpus:
    """What is read: windows [n, WINDOW] of token ids, their rows on disk, and the SAE."""

    ids: torch.Tensor
    activations: Any
    store: Any
    sae: LoadedSAE
    site: str = SITE


class Watch:
    """What a pass tells how far it is: calls `pause` once, when half of the tokens are through, and notes what that took."""

    def __init__(self) -> None:
        self._pause: Callable[[], None] | None = None
        self.away = (0.0, 0.0)

    def stop_here(self) -> None:
        """Nobody stops a benchmark."""

    def pause_half_way(self, pause: Callable[[], None]) -> None:
        """What to call."""
        self._pause = pause

    def progress(self, task: str, done: int, total: int, *rest: Any, **more: Any) -> None:
        if self._pause is not None and 2 * done >= total:
            pause, self._pause = self._pause, None
            clock, cpu = time.perf_counter(), time.process_time()
            pause()
            self.away = (time.perf_counter() - clock, time.process_time() - cpu)


def synthetic(root: Path, model: Any, arguments: argparse.Namespace) -> Corpus:
    """Random windows of frequent ids through the model, cut into shards as harvest does, and an untrained SAE."""
    n = max(1, arguments.rows // WINDOW)
    g = torch.Generator().manual_seed(0)
    ids = (torch.rand(n, WINDOW, generator=g).square() * (model.d_vocab - 3)).long() + 2
    ids[:, 0] = model.tokenizer.bos_token_id
    writer = ShardWriter(root / "acts")
    for number, start in enumerate(range(0, n, SHARD)):
        part = ids[start : start + SHARD]
        acts = torch.cat([model.capture(batch, [SITE])[SITE] for batch in part.split(BATCH)])
        window = torch.arange(start, start + len(part)).repeat_interleave(WINDOW)
        position = torch.arange(WINDOW).repeat(len(part))
        rows = {"acts": acts.flatten(0, 1), "window": window.int(), "position": position.int()}
        writer.write(number, {**rows, "token": part.flatten().int()}, len(window))
    writer.finish()
    documents = [w * arguments.documents // n for w in range(n)]
    store = SimpleNamespace(
        input_ids=ids.int(),
        windows={"document": documents},
        documents=[{}] * arguments.documents,
        tokenizer={"vocab_size": model.d_vocab, "special_ids": list(model.special_ids)},
    )
    return Corpus(ids, SimpleNamespace(path=root / "acts"), store, untrained(root / "sae", arguments, root / "acts"))


def untrained(folder: Path, arguments: argparse.Namespace, acts: Path) -> LoadedSAE:
    """An SAE as it is drawn, with k latents a token."""
    cls = load_plugins(folder=None).registry.get("architectures", arguments.arch)
    rows = ShardReader(acts).read(0)["acts"][:8192]
    torch.manual_seed(0)
    coder = cls(cls.Config(d_in=rows.shape[1], d_sae=arguments.d_sae, k=arguments.k))
    coder.calibrate(rows)
    save_sae(folder, coder.eval(), 1.0, Origin("bundled", SITE, WINDOW))
    return load_sae(folder)


def of_project(root: Path, sae: Path | None) -> Corpus:
    """The newest activations of a project, with their tokens and an SAE that reads them (default the newest)."""
    activations, trained = newest(root / "data" / "activations", "harvest"), newest(root / "results" / "saes", "train")
    folder = sae or (trained.path if trained else None)
    if activations is None or folder is None:
        sys.exit(f"{root} has no harvested activations, or no trained SAE")
    meta = json.loads((activations.path / "meta.json").read_bytes())
    store = TokenStore(root / "data" / "tokens" / meta["tokens_name"])
    whole = store.input_ids[store.length == store.window].long()
    return Corpus(whole, activations, store, load_sae(folder), meta["hook_point"])


def ways(corpus: Corpus, model: Any, n_forward: int, folder: Path, watch: Watch) -> list[Way]:
    """The rows of the table; the last is the pass."""
    n = min(len(corpus.ids), max(BATCH, n_forward // corpus.ids.shape[1]))
    some = corpus.ids[torch.arange(n) * len(corpus.ids) // n].split(BATCH)
    tokens = sum(batch.numel() for batch in some)
    reader = ShardReader(corpus.activations.path)
    ctx: Any = SimpleNamespace(run=watch)

    def forward() -> int:
        for batch in some:
            model.run(batch, [])
        return tokens

    def harvest() -> int:
        for batch in some:
            model.capture(batch, [corpus.site])
        return tokens

    def encode() -> int:
        rows = reader.read(0)["acts"].float()
        for chunk in rows.split(1024):
            corpus.sae.encode(chunk)
        return len(rows)

    def whole() -> int:
        work = Path(tempfile.mkdtemp(dir=folder))
        tables = feature_pass(ctx, corpus.sae, corpus.activations, corpus.store, work, device="cpu")
        return tables.n_tokens

    return [Way("model, full forward (floor)", forward), Way("harvest: capture", harvest), Way("encode alone", encode),
            Way("feature pass", whole)]  # fmt: skip


class Memory:
    """The largest memory between `begin` and `end` (there may be several such stretches), MiB."""

    def __init__(self) -> None:
        self.before, self.peak, self.exact = 0.0, 0.0, True

    def begin(self) -> None:
        """Forget what was, where Linux lets one."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.exact = False
        self.before = self.before or self._status("VmRSS")

    def end(self) -> None:
        self.peak = max(self.peak, self._status("VmHWM"))

    @staticmethod
    def _status(name: str) -> float:
        rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(rows[name].split()[0]) / 1024


def show(found: list[Way], memory: Memory, *, whole: bool) -> None:
    """Print the table; `whole`: of a corpus, where the rounds' mean counts."""
    floor = None
    print(f"{'':30s} {'tokens/s':>10s} {'us/token':>9s} {'CPU us':>8s} {'of forward':>11s} {'CPU':>7s}")
    for way in found:
        each, cpu = way.mean() if whole else way.best()
        floor = floor or (each, cpu)
        print(
            f"{way.name:30s} {1e6 / each:10,.0f} {each:9.1f} {cpu:8.1f} {each / floor[0]:11.0%} {cpu / floor[1]:7.0%}"
        )
    seconds, _, tokens = found[-1].rounds[0]
    print(f"{tokens:,} tokens in the pass, {seconds:,.0f} s")
    if whole:
        times = ", ".join(f"{1e6 * s / n:.1f}" for s, _, n in found[0].rounds)
        print(f"the forward before, in the middle of and after the pass: {times} us/token,")
        print(f"each time on {found[0].rounds[0][2]:,} tokens, windows spread evenly over the corpus")
    of = "of the pass" if memory.exact else "of the whole program (the pass's own cannot be told here)"
    print(f"memory before the pass {memory.before:,.0f} MiB; peak {of} {memory.peak:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a project whose rows, tokens and newest SAE are read")
    parser.add_argument("--sae", type=Path, help="with --corpus: another SAE's folder")
    parser.add_argument("--arch", default="batchtopk")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=65536, help="tokens of the pass, without --corpus")
    parser.add_argument("--forward", type=int, help="tokens of each forward (16,384, or 200,000 with --corpus)")
    parser.add_argument("--documents", type=int, default=55)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_model(model_dir(), name="bundled")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = (
            of_project(arguments.corpus, arguments.sae) if arguments.corpus else synthetic(folder, model, arguments)
        )
        memory, n_forward = Memory(), arguments.forward or (200_000 if arguments.corpus else 16384)
        watch = Watch()
        found = ways(corpus, model, n_forward, folder, watch)
        *sample, whole = found

        def others() -> None:
            for way in sample:
                way.run()

        def pause() -> None:
            memory.end()
            others()
            memory.begin()

        for _ in range(1 if arguments.corpus else arguments.rounds):
            others()
            if arguments.corpus:
                watch.pause_half_way(pause)
            memory.begin()
            whole.run(lambda: watch.away)
            memory.end()
        if arguments.corpus:
            others()
        print(f"{corpus.sae.arch}, {corpus.sae.d_sae:,} latents, {torch.get_num_threads()} threads")
        show(found, memory, whole=bool(arguments.corpus))


if __name__ == "__main__":
    main()
