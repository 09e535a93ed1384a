"""Text that is safe to print: what a model or a file says must not drive the terminal.

Escape sequences, other control characters (C0 but newline and tab, C1) and bidirectional overrides are dropped from
what is printed. In JSON they are written as escapes instead, so nothing is lost.
"""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Drop every character that could control a terminal; newline and tab stay."""
    return _UNPRINTABLE.sub("", text)


def one_line(text: str) -> str:
    """Make printable text of a single line, for error messages."""
    return " ".join(printable(text).split())


def between_words(line: str, width: int | None) -> str:
    """Break a line of more than ``width`` columns between words; None is no limit."""
    return line if width is None else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def json_line(value: Any) -> str:
    """Write a value as one line of JSON, readable and safe to print; NaN is refused."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def tokens(count: int) -> str:
    """Write the length of a context for people: ``8k``, ``7,680``."""
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def size(count: float) -> str:
    """Write a number of bytes for people: ``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
