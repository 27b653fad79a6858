"""Where things stand in a TOML text: line and column of every table header and every key.

tomli gives values without positions, and an error about a value is only useful with the line it stands on.
This reads the same text once more, just closely enough to follow strings, comments and brackets, and notes
where each name begins. It runs on texts that tomli has accepted, so it need not judge syntax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

__all__ = ["Path", "Positions", "line_at", "shown"]

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY_PART = re.compile(r"""[ \t]*(?:"((?:\\.|[^"\\\n])*)"|'([^'\n]*)'|([A-Za-z0-9_-]+))[ \t]*(\.?)""")
_VALUE_PIECE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|"(?:\\.|[^"\\\n])*"|'
    r"'''.*?'{3,5}|'[^'\n]*'|"
    r"""#[^\n]*|[^"'#\[\]{}\n]+|.""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")


def shown(text: object, limit: int = 80) -> str:
    """`text` made safe and short for an error message: control, bidi and invisible characters are escaped."""
    raw = str(text)
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in raw[: limit + 1])
    return safe if len(raw) <= limit else safe[:limit] + "…"


def line_at(text: str, line: int) -> str:
    """The 1-based `line` of `text`, safe to print."""
    lines = text.split("\n")
    return shown(lines[line - 1].rstrip("\r")) if 0 < line <= len(lines) else ""


class Positions:
    """Line and column (both from 1) of table headers and keys, by path.

    The path of the second source's title is `("source", 1, "title")`; that of its header is `("source", 1)`;
    that of a plain table's key is `("train", "k")`.
    """

    def __init__(self, text: str) -> None:
        self._found: dict[Path, tuple[int, int]] = {}
        self._arrays: dict[Path, int] = {}
        starts = [0] + [m.end() for m in re.finditer("\n", text)]
        line = 0
        for path, offset in self._names(text):
            while line + 1 < len(starts) and starts[line + 1] <= offset:
                line += 1
            self._found.setdefault(path, (line + 1, offset - starts[line] + 1))

    def at(self, path: Sequence[str | int]) -> tuple[int, int]:
        """Line and column of the deepest part of `path` that the text names; (1, 1) when none is."""
        for end in range(len(path), 0, -1):
            if tuple(path[:end]) in self._found:
                return self._found[tuple(path[:end])]
        return (1, 1)

    def _names(self, text: str) -> Iterator[tuple[Path, int]]:
        """Every header and key with its offset, in the order of the text."""
        table: Path = ()
        here = _skip(_BLANK, text, 0)
        while here < len(text):
            if text[here] == "[":
                array = text.startswith("[[", here)
                keys, after = _key(text, here + (2 if array else 1))
                table = self._enter(keys, array)
                for depth in range(1, len(table) + 1):
                    yield table[:depth], here
            else:
                keys, after = _key(text, here)
                for depth in range(1, len(keys) + 1):
                    yield (*table, *keys[:depth]), here
            here = _skip(_BLANK, text, max(_end_of_statement(text, after), here + 1))

    def _enter(self, keys: Sequence[str], array: bool) -> Path:
        """The path that a header opens: names below an array of tables belong to its latest element."""
        path: Path = ()
        for number, key in enumerate(keys):
            path = (*path, key)
            if array and number == len(keys) - 1:
                self._arrays[path] = self._arrays.get(path, -1) + 1
            if path in self._arrays:
                path = (*path, self._arrays[path])
        return path


def _skip(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return match.end() if match else start


def _key(text: str, start: int) -> tuple[list[str], int]:
    """The parts of a (dotted, maybe quoted) key that begins at `start`, and the offset after it."""
    parts: list[str] = []
    while match := _KEY_PART.match(text, start):
        basic, literal, bare, dot = match.groups()
        parts.append(_unescape(basic) if basic is not None else literal if literal is not None else bare)
        start = match.end()
        if not dot:
            break
    return parts, start


def _unescape(text: str) -> str:
    """Escapes of a quoted key; the rare ones beyond \\u, \\U and plain characters keep their letter."""
    return _ESCAPE.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else m[3], text)


def _end_of_statement(text: str, start: int) -> int:
    """Offset of the line end that closes the statement: newlines in strings and brackets do not."""
    depth = 0
    for match in _VALUE_PIECE.finditer(text, start):
        piece = match.group()
        if piece == "\n" and depth <= 0:
            return match.start()
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(piece, 0)
    return len(text)
