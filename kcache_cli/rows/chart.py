"""Charts as files: what may be asked for, and how a finished figure is written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.errors import InputError
from kcache_cli.replace import replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path | None) -> None:
    """Raise before anything is measured if the chart could not be drawn.

    Raises
    ------
    InputError
        For an unknown kind of file.
    """
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the kind is that of the name."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kcache", "svg.fonttype": "none"}):
        figure.savefig(drawn, dpi=150, format=path.suffix.lower().removeprefix("."))
    replace(path, drawn.getvalue())
