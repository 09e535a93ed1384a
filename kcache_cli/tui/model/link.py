"""The link panel as numbers: what crosses between the tiers, how fast, how much per token."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kcache.watch.frame import since
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.trace import Past


@dataclass(frozen=True, slots=True)
class LinkView:
    """Rates over the last second or so; ``None`` where there is nothing to tell yet.

    Attributes
    ----------
    h2d_s, d2h_s : float or None
        Bytes a second, up to the device and down to the host.
    per_token : float or None
        Bytes to the device per decoded token, all sequences together counting as so many tokens.
    hit_rate : float or None
        Share of the rows that the hot set had; ``None`` where no row was found hot so far.
    share : float or None
        ``h2d_s`` over the measured bandwidth of the link.
    measured_s : float or None
        That bandwidth, bytes a second.
    total_h2d, total_d2h, rows : int
        Since the cache was made.
    rows_per_step : float or None
    """

    h2d_s: float | None
    d2h_s: float | None
    per_token: float | None
    hit_rate: float | None
    share: float | None
    measured_s: float | None
    total_h2d: int
    total_d2h: int
    rows: int
    rows_per_step: float | None


def link_view(moment: Moment) -> LinkView:
    """Make the figures of a moment."""
    frame, info = moment.frame, moment.info
    assert frame is not None
    totals = frame.totals
    window = moment.past.window()
    h2d_s = d2h_s = per_token = rows_per_step = None
    hits = totals.hot_hits / totals.rows_fetched if totals.hot_hits and totals.rows_fetched else None
    if window is not None:
        first, last = window
        moved, time_s = since(first.totals, last.totals), last.time_s - first.time_s
        h2d_s, d2h_s = moved.bytes_h2d / time_s, moved.bytes_d2h / time_s
        if moved.steps and last.phase == "decode":
            per_token = moved.bytes_h2d / moved.steps / max(1, frame.batch)
            rows_per_step = moved.rows_fetched / moved.steps
            if moved.rows_fetched and totals.hot_hits:
                hits = moved.hot_hits / moved.rows_fetched
    if frame.phase == "idle":
        h2d_s = d2h_s = 0.0
    measured = None if info.link_gb_s is None else info.link_gb_s * 1e9
    return LinkView(
        h2d_s,
        d2h_s,
        per_token,
        hits,
        None if measured is None or h2d_s is None else h2d_s / measured,
        measured,
        totals.bytes_h2d,
        totals.bytes_d2h,
        totals.rows_fetched,
        rows_per_step,
    )


def rates(past: Past, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes a second between each two of the latest frames, to the device and to the host, ``[samples]`` each.

    The newest is last; zeros stand where the history is shorter, and at the beginning of a run.
    """
    up, down = np.zeros(samples), np.zeros(samples)
    points = past.points[-samples - 1 :]
    for at, (before, after) in enumerate(pairwise(points), samples - len(points) + 1):
        time_s = after.time_s - before.time_s
        if before.run == after.run and time_s > 0:
            moved = since(before.totals, after.totals)
            up[at], down[at] = moved.bytes_h2d / time_s, moved.bytes_d2h / time_s
    return up, down
