"""One cell of the heat map in figures: how often a range of positions was picked, and what those picks hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kcache.watch.frame import Frame, LayerFrame
from kcache_cli.tui.model.heat import rebin, seen_in
from kcache_cli.tui.model.moment import Moment


@dataclass(frozen=True, slots=True)
class Held:
    """Share of attention that picks hold, mean over query heads; ``at_step`` where it is of an earlier step."""

    share: float
    is_exact: bool
    at_step: int | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known about one cell.

    Attributes
    ----------
    layer : LayerFrame
    head : int or None
    positions : range
    count : int
        Picks of the last step in it; nearly, where only histograms are there.
    is_exact : bool
    share : float
        Of the layer's picks, or of the head's.
    held : Held or None
        What those in the cell hold; None where nobody knows.
    mass : float or None
        Share of attention that all picks hold, mean over the layer's query heads, or those of the KV head.
    """

    layer: LayerFrame
    head: int | None
    positions: range
    count: int
    is_exact: bool
    share: float
    held: Held | None
    mass: float | None


def cell(moment: Moment, layer: int, positions: range, head: int | None = None) -> Cell | None:
    """Look at one cell; None where there is no such layer."""
    if moment.frame is None or not 0 <= layer < len(moment.frame.layers):
        return None
    frame = seen_in(moment)
    it = frame.layers[layer]
    if it.picks is None:
        found = rebin(it.histogram[None], frame.bucket_tokens, positions.start, positions.stop, 1)
        count, total, head, masses = round(float(found.sum())), int(it.histogram.sum()), None, it.mass
    else:
        heads = range(it.picks.shape[1]) if head is None else [min(head, it.picks.shape[1] - 1)]
        picks = it.picks[:, heads]
        count, total = int(_inside(picks, positions).sum()), int((picks >= 0).sum())
        masses = it.mass
        if it.mass is not None and head is not None and it.mass.size % it.picks.shape[1] == 0:
            masses = it.mass.reshape(it.picks.shape[1], -1)[heads]
    mass = None if masses is None else float(masses.mean())
    nothing = it.picks is not None and not count
    held = Held(0.0, True) if nothing else _held(moment, frame, layer, positions, head)
    return Cell(it, head, positions, count, it.picks is not None, count / max(1, total), held, mass)


def _inside(picks: np.ndarray, positions: range) -> np.ndarray:
    inside: np.ndarray = (picks >= positions.start) & (picks < positions.stop)
    return inside


def _held(moment: Moment, frame: Frame, layer: int, positions: range, head: int | None) -> Held | None:
    """From exact picks, from buckets, or from the latest frame whose buckets say it."""
    it, earlier = frame.layers[layer], moment.past.weighed
    if it.picks is not None and it.weights is not None:
        heads = range(it.picks.shape[1]) if head is None else [min(head, it.picks.shape[1] - 1)]
        inside = it.weights[:, heads][_inside(it.picks[:, heads], positions)]
        return Held(float(inside.sum()) / (it.picks.shape[0] * len(heads)), True)
    if head is not None or it.mass is None:
        return None
    of = frame if it.held is not None or earlier is None else earlier
    buckets = of.layers[layer].held
    if buckets is None:
        return None
    share = float(rebin(buckets[None], of.bucket_tokens, positions.start, positions.stop, 1).sum())
    return Held(share, False, None if of is frame else of.step)
