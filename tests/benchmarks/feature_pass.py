"""The feature pass beside the model's own forward: tokens a second, overhead, peak memory.

    python tests/benchmarks/feature_pass.py                           # bundled model, its sample texts, an untrained SAE
    python tests/benchmarks/feature_pass.py --d-sae 4096 --k 64 --arch topk --rows 200000
    python tests/benchmarks/feature_pass.py --corpus PROJECT          # the rows, tokens and SAE of a project, whole

Floor: the bundled model's forward over whole windows, logits included, in batches as harvest makes them. Beside it the
capture that harvest does (it stops at the hook point), the SAE's encoding alone, and the pass: encoding, every table, and
the saving of its sums. The overhead is the pass's seconds a token over the forward's. Rounds are interleaved and the best of
each counts; CPU seconds are printed as well, since a busy machine spoils the clock. With --corpus the pass runs once.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from greatctl.corpus.windows import TokenStore
from greatctl.events import Run
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
    seconds: float = float("inf")
    cpu: float = float("inf")
    tokens: int = 0

    def run(self) -> None:
        """Once; the best round stays."""
        clock, cpu = time.perf_counter(), time.process_time()
        self.tokens = self.go()
        self.seconds = min(self.seconds, time.perf_counter() - clock)
        self.cpu = min(self.cpu, time.process_time() - cpu)


@dataclass(frozen=True)
class Corpus:
    """What is read: windows [n, WINDOW] of token ids, their rows on disk, and the SAE."""

    ids: torch.Tensor
    activations: Any
    store: Any
    sae: LoadedSAE
    site: str = SITE


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


def ways(corpus: Corpus, model: Any, arguments: argparse.Namespace, folder: Path) -> list[Way]:
    """The rows of the table."""
    some = corpus.ids[: max(BATCH, arguments.forward // WINDOW)]
    some = some.split(BATCH)
    tokens = sum(batch.numel() for batch in some)
    reader = ShardReader(corpus.activations.path)
    ctx: Any = SimpleNamespace(run=Run("benchmark"))

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


def resident() -> float:
    """MiB in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def show(found: list[Way], before: float) -> None:
    """Print the table."""
    floor = found[0]
    print(f"{'':30s} {'tokens/s':>10s} {'us/token':>9s} {'CPU us':>8s} {'of forward':>11s} {'CPU':>7s}")
    for way in found:
        each, cpu = (1e6 * seconds / way.tokens for seconds in (way.seconds, way.cpu))
        share, cpu_share = (a / b for a, b in ((each, 1e6 * floor.seconds / floor.tokens),
                                               (cpu, 1e6 * floor.cpu / floor.tokens)))  # fmt: skip
        print(f"{way.name:30s} {1e6 / each:10,.0f} {each:9.1f} {cpu:8.1f} {share:11.0%} {cpu_share:7.0%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{found[-1].tokens:,} tokens in the pass; memory before it {before:,.0f} MiB, peak {peak:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a project whose rows, tokens and newest SAE are read")
    parser.add_argument("--sae", type=Path, help="with --corpus: another SAE's folder")
    parser.add_argument("--arch", default="batchtopk")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=65536, help="tokens of the pass, without --corpus")
    parser.add_argument("--forward", type=int, default=16384, help="tokens of the forward passes")
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
        found = ways(corpus, model, arguments, folder)
        before = resident()
        for number in range(arguments.rounds):
            for way in found:
                if way is not found[-1] or not arguments.corpus or number == 0:
                    way.run()
        print(f"{corpus.sae.arch}, {corpus.sae.d_sae:,} latents, {torch.get_num_threads()} threads")
        show(found, before)


if __name__ == "__main__":
    main()
