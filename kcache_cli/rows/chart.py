"""Charts as files: what may be asked for, and how a finished figure is written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.errors import InputError
from kcache_cli.replace import replace
from kcache_cli.rows.store import check_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def chart_file(name: str | None) -> Path | None:
    """The file ``--plot`` names; a chart that could not be drawn is refused before anything is measured.

    Raises
    ------
    InputError
    """
    path = check_file("--plot", name)
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the kind is that of the name."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kcache", "svg.fonttype": "none"}):
        figure.savefig(drawn, dpi=150, format=path.suffix.lower().removeprefix("."))
    replace(path, drawn.getvalue())
