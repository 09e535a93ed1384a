"""The text that ``kcache eval`` measures on: files, or the reference prose that comes with Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kcache_cli.rows.store import read_text

if TYPE_CHECKING:
    from kcache.evaluate.haystack import Prose


def read_prose(names: Sequence[str] | None) -> Prose:
    """Read text files, one after the other; without any, the Python reference.

    Raises
    ------
    InputError
        If a file cannot be read or is not UTF-8 text.
    """
    from kcache.bench.context import reference_prose
    from kcache.evaluate.haystack import Prose

    if not names:
        return Prose("the Python reference", reference_prose())
    return Prose(", ".join(Path(name).name for name in names), "\n\n".join(read_text("--text", name) for name in names))
