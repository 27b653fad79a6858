"""Turn raw Project Gutenberg files into plain paragraphs, one a line, ready to be learned from.

The reference model should learn prose, not line ends, licence text or tables of figures. So this cuts the
wrapper that Project Gutenberg puts around a book (all three generations of it), joins the hard-wrapped
lines of a paragraph, keeps the lines of verse apart, and drops what is hardly letters at all. It is
deliberately smaller than the cleaner of the corpus room: here a wrong paragraph costs nothing, there it
would be evidence.

    python -m greatctl.reference.prepare RAW_DIR TEXT_DIR

"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

START = re.compile(r"^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG", re.IGNORECASE)
SMALL_PRINT_END = re.compile(r"^\*END\*? ?THE SMALL PRINT!", re.IGNORECASE)
END = re.compile(
    r"^(?:\*{3} ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg)",
    re.IGNORECASE,
)
CREDITS = re.compile(
    r"^(?:Produced by|E-text prepared by|Transcribed from|\[?Transcriber'?s? note"
    r"|This (?:e-?text|file|ebook) was)",
    re.IGNORECASE,
)
CHARSET = re.compile(r"^Character set encoding:\s*(\S+)", re.IGNORECASE | re.MULTILINE)
MARKUP = re.compile(
    r"\[(?:Illustration|Sidenote|Pg|Page|Footnote)\b[^\]]*\]|\[\d{1,3}\]|\{[ivxlc\d]{1,6}\}", re.IGNORECASE
)
EMPHASIS = re.compile(r"(?<!\w)[_=](?=\S)|(?<=\S)[_=](?!\w)")


def decode(raw: bytes) -> str:
    """The text of `raw`: UTF-8 where it is valid, else the declared character set, else Windows-1252."""
    head = raw[:4000].decode("latin-1")
    declared = CHARSET.search(head)
    for encoding in ("utf-8-sig", declared.group(1) if declared else "cp1252", "cp1252", "latin-1"):
        try:
            return raw.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    return raw.decode("latin-1")


def strip_wrapper(lines: list[str]) -> list[str]:
    """The lines of the book itself, without Project Gutenberg's header, small print and licence."""
    first = 0
    for number, line in enumerate(lines):
        if START.match(line):
            first = number + 1
            while "***" not in lines[number][3:] and number + 1 < len(lines):  # the title may wrap
                number += 1
                first = number + 1
            break
        # Around 2003 the small print moved to the end: believe this marker only near the top.
        if SMALL_PRINT_END.match(line) and number < min(600, len(lines) // 2):
            first = number + 1
    ends = [number for number, line in enumerate(lines) if number > first and END.match(line)]
    # Joined parts hold several ends: the book runs to the last group of them.
    last = len(lines)
    for number in reversed(ends):
        if last != len(lines) and last - number > 40:
            break
        last = number
    return lines[first:last]


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []


def join(block: list[str]) -> list[str]:
    """A paragraph as one line; verse (several short indented lines) as one line each."""
    indented = sum(line.startswith("  ") for line in block)
    if len(block) > 1 and indented >= 0.8 * len(block) and max(map(len, block)) < 60:
        return [line.strip() for line in block]
    text = ""
    for line in map(str.strip, block):
        broken_word = text.endswith("-") and not text.endswith("--")
        text += line if not text or broken_word else " " + line
    return [text]


def is_prose(text: str) -> bool:
    """False for rules, tables of figures and index lines: too few letters, or columns of blanks."""
    solid = [c for c in text if not c.isspace()]
    letters = sum(c.isalpha() for c in solid)
    return letters >= 2 and letters >= 0.72 * len(solid)


def paragraphs(raw: bytes) -> list[str]:
    """The clean paragraphs of one raw Gutenberg file, in order."""
    lines = strip_wrapper(decode(raw).replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    result: list[str] = []
    for index, block in enumerate(blocks(lines)):
        if index < 12 and CREDITS.match(block[0].strip()):
            continue
        if sum(bool(re.search(r"\S\s{3,}\S", line)) for line in block) > 0.5 * len(block):
            continue  # columns
        for line in join(block):
            text = re.sub(r"\s+", " ", EMPHASIS.sub("", MARKUP.sub("", line))).strip()
            if is_prose(text):
                result.append(text)
    return result


def prepare(raw_dir: Path, text_dir: Path) -> dict[str, int]:
    """Write a clean .txt for every .txt below `raw_dir`; returns name -> bytes written."""
    text_dir.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    for path in sorted(raw_dir.rglob("*.txt")):
        text = "\n".join(paragraphs(path.read_bytes())) + "\n"
        (text_dir / path.name).write_text(text, encoding="utf-8", newline="\n")
        sizes[path.name] = len(text.encode())
    return sizes


def main(arguments: list[str] | None = None) -> int:
    """Command line: raw folder in, clean folder out."""
    parser = argparse.ArgumentParser(prog="python -m greatctl.reference.prepare", description="Clean Gutenberg files.")
    parser.add_argument("raw_dir", type=Path)
    parser.add_argument("text_dir", type=Path)
    options = parser.parse_args(arguments)
    prepare(options.raw_dir, options.text_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
