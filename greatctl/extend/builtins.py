"""What greatctl itself gives, through the same hooks as any plugin; strings, so listing imports nothing."""

from __future__ import annotations

from .hookspecs import Register, hookimpl

__all__ = ["register_architectures", "register_metrics", "register_sources"]


@hookimpl
def register_sources(register: Register) -> None:
    """Where the manifest's texts come from."""
    register("gutenberg", "greatctl.corpus.gutenberg:Gutenberg")
    register("archive", "greatctl.corpus.archive:Archive")
    register("standard-ebooks", "greatctl.corpus.standard_ebooks:StandardEbooks")
    register("manual", "greatctl.corpus.manual:Manual")


@hookimpl
def register_architectures(register: Register) -> None:
    """Sparse autoencoders, one file each."""
    register("relu", "greatctl.sae.relu:Relu")
    register("gated", "greatctl.sae.gated:Gated")
    register("topk", "greatctl.sae.topk:TopK")
    register("batchtopk", "greatctl.sae.batchtopk:BatchTopK")
    register("jumprelu", "greatctl.sae.jumprelu:JumpRelu")
    register("matryoshka", "greatctl.sae.matryoshka:Matryoshka")
    register("transcoder", "greatctl.sae.transcoder:Transcoder")
    register("skip-transcoder", "greatctl.sae.skip_transcoder:SkipTranscoder")


@hookimpl
def register_metrics(register: Register) -> None:
    """What patching measures at the answer position."""
    register("logit-diff", "greatctl.patching.metrics:LogitDiff")
    register("logit", "greatctl.patching.metrics:Logit")
    register("prob", "greatctl.patching.metrics:Prob")
    register("prob-diff", "greatctl.patching.metrics:ProbDiff")
    register("log-prob", "greatctl.patching.metrics:LogProb")
    register("kl", "greatctl.patching.metrics:KL")
    register("js", "greatctl.patching.metrics:JS")
    register("rank", "greatctl.patching.metrics:Rank")
    register("accuracy", "greatctl.patching.metrics:Accuracy")
    register("ce", "greatctl.patching.metrics:CE")
