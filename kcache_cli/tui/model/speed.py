"""The speed panel as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kcache_cli.tui.model.moment import Moment


@dataclass(frozen=True, slots=True)
class SpeedView:
    """How fast it goes; ``None`` where there is nothing to tell.

    ``itl_ms`` is the latest inter-token latency, ``itls`` those of the frames before, oldest first, ``middle`` and
    ``slow`` their median and 95th percentile.
    """

    tok_s: float | None
    ttft_s: float | None
    itl_ms: float | None
    middle: float | None
    slow: float | None
    itls: tuple[float, ...]


def speed_view(moment: Moment) -> SpeedView:
    """Make the figures of a moment."""
    frame = moment.frame
    assert frame is not None
    itls: list[float] = []
    step = -1
    for point in moment.past.points:
        if point.itl_ms is not None and point.phase == "decode" and point.step != step:
            itls.append(point.itl_ms)
        step = point.step
    ordered = sorted(itls)
    speed = frame.speed
    return SpeedView(
        speed.tok_s,
        None if speed.ttft_ms is None else speed.ttft_ms / 1e3,
        speed.itl_ms,
        ordered[len(ordered) // 2] if ordered else None,
        ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)] if ordered else None,
        tuple(itls),
    )
