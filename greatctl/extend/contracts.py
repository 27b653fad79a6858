"""What a plugin gives, stated once.

Three contracts: a `Source` says where texts are and how to read them; a `SparseCoder` is an autoencoder architecture; a
`PatchMetric` turns logits into one number per example. Built-in items keep the same contracts, and
`greatctl.extend.testing` checks them. Nothing here imports torch at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from ..manifest import Entry

__all__ = [
    "KINDS",
    "Answers",
    "Document",
    "PatchMetric",
    "Removed",
    "Resource",
    "SequenceScores",
    "Source",
    "SparseCoder",
]

KINDS = ("sources", "architectures", "metrics")


@dataclass(frozen=True)
class Resource:
    """A file to download.

    Attributes:
        url: canonical https address; what the host records. `--mirror` changes where the bytes come from, not this.
        filename: the name it is kept under (`original.txt`).
        max_bytes: the download stops beyond this size.
        size, md5, sha1, sha256: known facts, checked after the download where given.
    """

    url: str
    filename: str
    max_bytes: int = 64 * 2**20
    size: int | None = None
    md5: str | None = None
    sha1: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Removed:
    """A piece that cleaning cut: the rule's name and the text that it cut."""

    rule: str
    text: str


@dataclass(frozen=True)
class Document:
    """A work's clean text: NFC, `\\n` line ends, one paragraph a line with a blank line between paragraphs."""

    text: str
    removed: Sequence[Removed] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """Where texts of one kind are, and how their bytes become a document. The host downloads.

    Attributes:
        kind: the value of `kind` in the manifest.
        hosts: the only hosts that may be contacted for it (exact names, or `*.example.org`).
    """

    kind: ClassVar[str]
    hosts: ClassVar[frozenset[str]]

    def locate(self, entry: Entry, get: Callable[[str], bytes]) -> Sequence[Resource]:
        """The files of a manifest entry. `get(url)` fetches small records (catalogue, metadata) under the same rules."""
        ...

    def read(self, entry: Entry, files: Mapping[str, bytes]) -> Document:
        """Turn the downloaded bytes (filename -> bytes) into a document. Pure: no network, no clock, no disk.

        Raises:
            IntegrityError: the bytes are not the work they should be.
        """
        ...


@runtime_checkable
class SparseCoder(Protocol):
    """A sparse autoencoder: a torch module with typed configuration (see `greatctl.sae.coder.Coder`, the base class).

    Shapes: x [n, d_in] float, latents [n, d_sae] float >= 0.
    """

    name: ClassVar[str]
    Config: ClassVar[type]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latent activations [n, d_sae] of activations [n, d_in]."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Reconstruction [n, d_in] from latents [n, d_sae]."""
        ...

    def losses(self, x: torch.Tensor, *, dead: torch.Tensor, step: int) -> Mapping[str, torch.Tensor]:
        """Named loss terms (scalars, already weighted; their sum is the loss) for one batch; `dead` [d_sae] bool."""
        ...

    def after_step(self) -> None:
        """Called after each optimiser step (renormalise the decoder, say)."""
        ...


@dataclass(frozen=True)
class SequenceScores:
    """What answers of several tokens scored, summed over their tokens by the host; each is [n].

    The prompt is followed by the answer's own tokens (teacher forcing), and each token is scored where it is
    predicted. Of several alternatives the log-sum-exp is kept.

    Attributes:
        right_logit, wrong_logit: sums of logits.
        right_log_prob, wrong_log_prob: sums of log-probabilities, so exp() is the probability of the text.
    """

    right_logit: torch.Tensor
    wrong_logit: torch.Tensor
    right_log_prob: torch.Tensor
    wrong_log_prob: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """What a metric may look at besides the patched logits; one row an example.

    Attributes:
        answer: token ids [n], long.
        wrong_answer: token ids [n], long.
        clean_logits: logits [n, d_vocab] of the clean run at the answer position.
        corrupted_logits: logits [n, d_vocab] of the corrupted run at the answer position.
        right: token ids [n, s] of all right answers, long, padded with -1; `answer` alone unless given.
        wrong: token ids [n, s'] of all wrong answers, likewise.
        sequence: the scores of the patched run where answers have several tokens (`right` and `wrong` then hold
            their first tokens), else None.
    """

    answer: torch.Tensor
    wrong_answer: torch.Tensor
    clean_logits: torch.Tensor
    corrupted_logits: torch.Tensor
    right: torch.Tensor = None  # type: ignore[assignment]  # filled in below
    wrong: torch.Tensor = None  # type: ignore[assignment]
    sequence: SequenceScores | None = None

    def __post_init__(self) -> None:
        for name, token in (("right", self.answer), ("wrong", self.wrong_answer)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, token[:, None])

    def rows(self, index: torch.Tensor | slice) -> Answers:
        """The same for some of the examples, repeated or reordered as `index` says."""
        scores = self.sequence and SequenceScores(**{name: value[index] for name, value in vars(self.sequence).items()})
        plain = {name: value[index] for name, value in vars(self).items() if name != "sequence"}
        return Answers(**plain, sequence=scores)


@runtime_checkable
class PatchMetric(Protocol):
    """Gives each example its own number; means, intervals and normalising are the host's work.

    Attributes:
        name: the value of `--metric`.
        unit: `logits`, `probability`, `nats`, ….
        differentiable: whether attribution methods may use it.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    differentiable: ClassVar[bool]

    def __call__(self, logits: torch.Tensor, answers: Answers) -> torch.Tensor:
        """The metric [n] of logits [n, d_vocab] at the answer position."""
        ...
