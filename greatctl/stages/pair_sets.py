"""From the name that a person gives to a set of pairs to the pairs: bundled, a file, one pair by hand, or made up.

`copying` pairs are made for the model in use, out of words that its tokenizer has; all others are texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import UsageError, did_you_mean
from ..patching.pair_files import Pair, read_pairs
from ..store.files import canonical_json, sha256_bytes
from .context import Context
from .models import slug

__all__ = ["COPYING", "chosen_pairs", "identity_of"]

COPYING = "copying"
_ONE = ("clean", "corrupted", "answer", "wrong_answer")


class Named(Protocol):
    """The settings that name pairs."""

    @property
    def pairs(self) -> str: ...
    @property
    def seed(self) -> int: ...


def chosen_pairs(ctx: Context, config: Named, source: str | Path) -> tuple[str, list[Pair]]:
    """The pairs and a short word for them: the bundled name, the file's stem, `given` or `copying`.

    Args:
        ctx: whose offline setting counts.
        config: the settings of `patch`.
        source: the model's folder or hub id, for pairs that are made of its words.

    Raises:
        UsageError: no bundled pairs have that name, or a pair by hand is incomplete.
        InputError, ManifestError: the file cannot be read, or is malformed.
    """
    given = {name: getattr(config, name) for name in _ONE}
    if any(value is not None for value in given.values()):
        missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if not value]
        if missing:
            raise UsageError(
                "a pair on the command line needs all of its four parts",
                why=f"{', '.join(missing)} missing",
                fix="give --clean, --corrupted, --answer and --wrong-answer, or a file with --pairs",
            )
        return "given", [Pair(id="given", **given)]
    path = Path(config.pairs).expanduser()
    if path.suffix or len(path.parts) > 1:
        return slug(path.stem), read_pairs(path)
    if config.pairs == COPYING:
        from ..model.tokenizer import encode, load_tokenizer
        from ..patching.copying import copying_pairs

        tokenizer = load_tokenizer(source, offline=ctx.offline)
        return COPYING, copying_pairs(tokenizer, lambda text: encode(tokenizer, text), seed=config.seed)
    from .. import reference

    known = [*reference.PAIR_SETS, COPYING]
    if config.pairs not in known:
        raise UsageError(
            f"no pairs are called {config.pairs!r}",
            why=f"there are {', '.join(known)}; a file has an ending or a folder in its name",
            fix=did_you_mean(config.pairs, known),
        )
    return config.pairs, read_pairs(Path(reference.pairs_path(config.pairs)))


def identity_of(label: str, pairs: Sequence[Pair]) -> dict[str, str]:
    """The settings that tell one set of pairs from another: the word for them, and a hash of all that they say."""
    return {"pairs": label, "pairs_sha256": sha256_bytes(canonical_json([pair.row() for pair in pairs]).encode())}
