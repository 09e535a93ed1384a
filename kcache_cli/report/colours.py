"""Heat maps as pixels: a PNG of one pixel per cell, for a light page and for a dark one, and the scale's legend."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Picture:
    """A heat map to put on a page.

    Attributes
    ----------
    light, dark : str
        PNG as ``data:`` addresses.
    rows, columns : int
    top : float
        The value at the end of the scale; the colour goes with its square root.
    cells : str
        Values as bytes, 255 the end of the scale, row after row, in base64.
    held : str
        Shares of attention in the same way, 254 all of it, 255 where nobody knows.
    """

    light: str
    dark: str
    rows: int
    columns: int
    top: float
    cells: str
    held: str


def picture(values: np.ndarray, held: np.ndarray) -> Picture:
    """Colour ``[rows, columns]``; the scale ends where only the brightest few cells lie above."""
    bright = values[values > 0]
    top = float(np.quantile(bright, 0.97)) if bright.size else 1.0
    cells = _roots(values / top, 255)
    return Picture(
        light=_png(cells, dark=False),
        dark=_png(cells, dark=True),
        rows=values.shape[0],
        columns=values.shape[1],
        top=top,
        cells=_base64(cells),
        held=_base64(np.where(np.isnan(held), 255, _roots(np.nan_to_num(held), 254)).astype(np.uint8)),
    )


def _roots(shares: np.ndarray, most: int) -> np.ndarray:
    roots: np.ndarray = np.rint(np.sqrt(np.clip(shares, 0, 1)) * most).astype(np.uint8)
    return roots


def _base64(cells: np.ndarray) -> str:
    return base64.b64encode(cells.tobytes()).decode("ascii")


def ramp(dark: bool) -> str:
    """The scale itself, as a PNG of one row."""
    return _png(np.arange(256, dtype=np.uint8)[None, :], dark)


def _png(cells: np.ndarray, dark: bool) -> str:
    from matplotlib import colormaps
    from matplotlib.image import imsave

    # The ends of the map that are closest to the page's background stand for nothing.
    colours = (
        colormaps["inferno"](np.linspace(0.04, 1.0, 256)) if dark else colormaps["magma_r"](np.linspace(0, 0.92, 256))
    )
    colours[0] = (0, 0, 0, 0)
    out = io.BytesIO()
    imsave(out, colours[cells], format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
