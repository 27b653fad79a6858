"""Foreign values made fit to be shown: numbers that JSON has, and text in which no character acts without being seen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

__all__ = ["clean", "dumps", "seen"]

# Control characters but line breaks and tabs, and those that turn the direction of what follows them.
_ACTING = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def clean(value: object) -> object:
    """JSON values with every number finite: NaN and infinities become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def seen(value: object) -> object:
    """The same with every character that acts without being seen written out, as `\\x1b` or `\\u202e`."""
    if isinstance(value, str):
        return _ACTING.sub(lambda m: f"\\x{ord(m[0]):02x}" if m[0] < "\u0100" else f"\\u{ord(m[0]):04x}", value)
    if isinstance(value, Mapping):
        return {seen(k): seen(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [seen(v) for v in value]
    return value


def dumps(value: object) -> str:
    """Strict JSON values as one document with the same content; a terminal that prints it finds nothing to obey."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _ACTING.sub(lambda m: f"\\u{ord(m[0]):04x}", text) + "\n"
