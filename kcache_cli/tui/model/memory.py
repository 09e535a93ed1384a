"""The memory panel as numbers: what is in which tier, and what a full KV cache would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kcache_cli.tui.model.moment import Moment

Part = Literal["weights", "k", "v", "overhead", "hot", "activations", "free", "host_v", "ghost", "other"]
_SHOWS_ALL = 0.3
"""A bar ends with the tier's total once what we hold is this share of it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a bar."""

    part: Part
    label: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: a name, what is in it, and what else there is to say.

    ``cut`` says that free memory goes on beyond the end of the bar.
    """

    name: str
    segments: tuple[Segment, ...]
    used: int
    free: int | None = None
    total: int | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class MemoryView:
    """The bars, all to one scale of ``scale`` bytes, and the bytes that are not on the device."""

    device: Bar
    host: Bar
    ghost: Bar
    scale: int
    saved: int


def memory_view(moment: Moment) -> MemoryView:
    """Make the bars of a moment."""
    info, frame = moment.info, moment.frame
    assert frame is not None
    totals, memory = frame.totals, frame.memory
    weights, kv = info.weights_bytes, totals.device_bytes
    activations = 0 if memory.allocated is None else max(0, memory.allocated - weights - kv)
    segments = [
        Segment("weights", "weights", weights),
        Segment("k", "K", totals.k_bytes),
        Segment("v", "V", totals.resident_v_bytes),
        Segment("overhead", "overhead", max(0, totals.overhead_bytes - totals.hot_bytes)),
        Segment("hot", "hot rows", totals.hot_bytes),
        Segment("activations", "activations", activations),
    ]
    used = weights + kv + activations
    if memory.device_total is not None and memory.device_free is not None and not info.host_only:
        others = memory.device_total - memory.device_free - used
        segments.append(Segment("other", "other", max(0, others)))
    ghost = (
        Segment("weights", "weights", weights),
        Segment("ghost", "full KV", totals.full_kv_bytes),
    )
    most = max(used, weights + totals.full_kv_bytes, totals.host_bytes, 1)
    total = memory.device_total or 0
    shows_all = not info.host_only and most >= _SHOWS_ALL * total
    scale = max(total, most) if shows_all else int(most * 1.12)
    device, host = ("device tier (RAM)", "host tier (RAM)") if info.host_only else ("device (HBM)", "host (RAM)")
    kept = tuple(segment for segment in segments if segment.bytes)
    return MemoryView(
        Bar(device, kept, used, memory.device_free, memory.device_total, not shows_all),
        Bar(
            host,
            (Segment("host_v", "V", totals.host_bytes),) if totals.host_bytes else (),
            totals.host_bytes,
            memory.host_free or None,
            memory.host_total or None,
            True,
        ),
        Bar("full KV cache", tuple(each for each in ghost if each.bytes), weights + totals.full_kv_bytes),
        scale,
        totals.full_kv_bytes - kv,
    )


def lengths(segments: tuple[Segment, ...], scale: int, width: int) -> list[int]:
    """Eighths of a cell for each segment, of a bar of ``width`` cells for ``scale`` bytes; none that holds bytes is 0.

    Rounded so that the ends of the segments, not their lengths, are right.
    """
    ends, before, total = [], 0, 0
    for segment in segments:
        total += segment.bytes
        end = round(total * width * 8 / max(1, scale))
        ends.append(max(end, before + 1) - before)
        before += ends[-1]
    return ends
