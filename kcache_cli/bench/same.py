"""What makes two rows of ``kcache bench`` the same measurement, for resuming and comparing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kcache_cli.rows.formats import Row

COMMAND = "kcache bench"
NAMES = {"engine", "ctx", "batch"}
"""Fields every row has."""
IDENTITY = ("engine", "model", "ctx", "batch", "topn", "dtype", "device")
"""What makes two rows measurements of the same thing."""
_SETTINGS = ("policy", "context_from", "repeats", "steps")


def identity(row: Row) -> tuple[Any, ...]:
    """What the row measures."""
    return tuple(row.get(name) for name in IDENTITY)


def same_settings(row: Row, wanted: Row) -> bool:
    """Whether a row was measured in the way that is wanted now."""
    return all(row.get(name) == wanted.get(name) for name in _SETTINGS)


def compare_with(old: Sequence[Row] | None, rows: Iterable[Row]) -> list[Row]:
    """Add ``compare_ratio`` to each row: its speed over that of the same row in ``old``, above 1 is faster now.

    Without rows to compare with the rows stay as they are.
    """
    if old is None:
        return [*rows]
    before = {identity(row): row.get("decode_ms_p50") for row in old}
    compared = []
    for row in rows:
        then, now = before.get(identity(row)), row.get("decode_ms_p50")
        compared.append({**row, "compare_ratio": then / now if then and now else None})
    return compared
