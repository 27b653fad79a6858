"""What cleaning cut, kept for the record.

No rule throws words away: every rule says what it took, and the pieces go into removed.txt beside the text. So the
visible characters of a file are those of its clean text and of the pieces, together; a test counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..extend.contracts import Removed

__all__ = ["Cleaner"]


@dataclass
class Cleaner:
    """Collects what the rules cut. `cut(rule, text)` ignores blank pieces."""

    removed: list[Removed] = field(default_factory=list)

    def cut(self, rule: str, text: str) -> None:
        """Note that `rule` cut `text`."""
        if text.strip():
            self.removed.append(Removed(rule, text.strip("\n")))
