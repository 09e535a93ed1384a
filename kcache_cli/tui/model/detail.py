"""One layer in detail, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kcache.watch.frame import LayerFrame
from kcache_cli.tui.model.layers import LayerRow, layer_rows
from kcache_cli.tui.model.moment import Moment


@dataclass(frozen=True, eq=False)
class Detail:
    """A layer: its row of the table, the frame's, the mass of each query head, and the rows picked by each KV head.

    Attributes
    ----------
    groups : tuple of tuple of float
        Mass of the query heads, those of one KV head together.
    picked : tuple of int
        Rows each KV head picked in the last step with exact picks, of the first sequence.
    histogram : ndarray ``[W]``
    """

    row: LayerRow
    layer: LayerFrame
    groups: tuple[tuple[float, ...], ...]
    picked: tuple[int, ...]
    histogram: np.ndarray


def detail(moment: Moment, index: int) -> Detail | None:
    """Look at a layer; None where there is none."""
    frame = moment.frame
    if frame is None or not 0 <= index < len(frame.layers):
        return None
    layer = frame.layers[index]
    row = layer_rows(moment)[index]
    seen = moment.past.picked
    picks = layer.picks
    if picks is None and seen is not None and index < len(seen.layers):
        picks = seen.layers[index].picks
    picked = () if picks is None else tuple(int(count) for count in (picks[0] >= 0).sum(1))
    mass = [] if layer.mass is None else [float(share) for share in layer.mass]
    each = max(1, len(mass) // len(picked)) if picked else max(1, len(mass))
    groups = tuple(tuple(mass[at : at + each]) for at in range(0, len(mass), each))
    return Detail(row, layer, groups, picked, layer.histogram)
