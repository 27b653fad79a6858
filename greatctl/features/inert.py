"""Foreign words made inert: what a label or a token may look like on a page, in a terminal and in a file.

A labeler's answer is text from a stranger about text from strangers. It may hold escape sequences, HTML, markup or
invisible characters. Sequences and invisible characters are taken out here, once; what is left is still only text, which
every view escapes in its own way.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["inert"]

# CSI, then OSC/DCS strings up to their end, then the short escapes; also in their one-byte (C1) form
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c|$)|\x1b.?", re.S
)
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")


def inert(text: str, limit: int) -> str:
    """One line of at most `limit` characters without escape sequences and invisible characters.

    White space of any kind becomes one blank; HTML stays as the letters that it is written with.
    """
    plain = _ESCAPES.sub("", text[: 64 * limit])
    shown = "".join(" " if c.isspace() else "" if unicodedata.category(c) in _INVISIBLE else c for c in plain)
    line = " ".join(shown.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
