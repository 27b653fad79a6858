"""Foreign text made safe for a terminal.

Corpus text, model output and labels may hold escape sequences, markup or bidirectional controls. They are printed as
what they are: control characters as `\\xNN`, and never interpreted as Rich markup.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["literal", "paragraphs", "visible"]

_UNSEEN = {  # bidirectional controls, and characters without a width that would hide in a word
    *"\u200b\u200c\u200d\u200e\u200f\u061c\u2060\ufeff",
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
}


def visible(text: str) -> str:
    """`text` with control, bidirectional and invisible characters written out, newlines as a return sign."""
    out = []
    for char in text:
        if char == "\n":
            out.append("\u21b5")
        elif char in _UNSEEN or unicodedata.category(char) in ("Cc", "Cs", "Co"):
            code = ord(char)
            out.append(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
        else:
            out.append(char)
    return "".join(out)


def literal(text: object, style: str = "") -> Text:
    """A Rich text that shows `text` as it is, never as markup."""
    from rich.text import Text  # here, since completion needs `visible` alone and has no time to spare

    return Text(visible(str(text)), style=style)


def paragraphs(text: object, style: str = "") -> Text:
    """As `literal`, but line breaks break lines: for words of greatctl's own that may quote foreign text."""
    from rich.text import Text

    return Text("\n".join(visible(line) for line in str(text).splitlines()), style=style)
