"""The charts of a run over time: memory, link, speed, and how much attention the picked rows held."""

from __future__ import annotations

import numpy as np

from kcache_cli.report.charts import Axis, Chart, Form, Shape, Tick, area, line, nice, y_ticks
from kcache_cli.report.samples import Samples
from kcache_cli.text import size

_PARTS = 6
"""Between marks on the horizontal axis."""


def charts(samples: Samples, axis: Axis, host_only: bool) -> list[Chart]:
    """All charts there is something to draw for."""
    others = (_rate, _per_step, _latency, _attention)
    drawn = [draw(samples, axis) for draw in others]
    return [_memory(samples, axis, host_only), *(chart for chart in drawn if chart is not None)]


def x_ticks(samples: Samples, axis: Axis) -> list[Tick]:
    """Time since the first frame, at frames spread evenly over the axis."""
    places = sorted({round(part * (len(samples) - 1) / _PARTS) for part in range(_PARTS + 1)})
    return [Tick(axis.at(at), clock(samples.seconds[at])) for at in places]


def readout(samples: Samples, axis: Axis) -> list[str]:
    """What every point of the axis is: for the line under the pointer."""
    ends = axis.last(np.arange(len(samples))).astype(int)
    return [
        f"{clock(samples.seconds[at])} · {samples.phase[at]} · "
        f"step {samples.step[at]:,} · {samples.tokens[at]:,} tokens"
        for at in ends.tolist()
    ]


def clock(seconds: float) -> str:
    """A stretch of time: ``4.2 s``, ``3:07``, ``1:02:45``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _memory(samples: Samples, axis: Axis, host_only: bool) -> Chart:
    names = ("device_k", "device_v", "overhead", "host_v")
    labels = ("K, device", "V, device", "policy overhead, device", "V, host")
    full = axis.last(samples.column("full"))
    layers = [axis.last(samples.column(name)) for name in names]
    ends = np.cumsum(layers, axis=0)
    top = nice(max(float(ends[-1].max()), float(full.max())), 1024.0)
    below = np.vstack([np.zeros(axis.points), ends[:-1]])
    shapes = [
        Shape(name, label, area(axis, end, start, top), _words(values, size), area=True)
        for name, label, end, start, values in zip(names, labels, ends, below, layers, strict=True)
    ]
    shapes.append(Shape("ghost", "a full KV cache on the device", line(axis, full, top), _words(full, size)))
    tiers = "both tiers are RAM" if host_only else "device and host"
    return Chart("memory", "Memory", f"what the cache holds, {tiers}", shapes, y_ticks(top, size))


def _rate(samples: Samples, axis: Axis) -> Chart | None:
    took = axis.total(samples.took)
    directions = [_over(axis.total(samples.column(name)), took) for name in ("h2d", "d2h")]
    return _two("link", "Link", "bytes per second between host and device", axis, directions, _per_second)


def _per_step(samples: Samples, axis: Axis) -> Chart | None:
    steps = axis.total(samples.column("steps"))
    decoding = samples.column("steps") > 0
    directions = [_over(axis.total(np.where(decoding, samples.column(name), 0)), steps) for name in ("h2d", "d2h")]
    return _two("step", "Link per step", "bytes that one decode step moves", axis, directions, size)


def _two(name: str, title: str, note: str, axis: Axis, values: list[np.ndarray], form: Form) -> Chart | None:
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    if not known.any():
        return None
    top = nice(float(known.max()), 1024.0 if form is size else 1000.0)
    shapes = [
        Shape(style, label, area(axis, np.nan_to_num(series), np.zeros(axis.points), top), _words(series, form), True)
        for style, label, series in zip(("h2d", "d2h"), ("host to device", "device to host"), values, strict=True)
    ]
    return Chart(name, title, note, shapes, y_ticks(top, form))


def _latency(samples: Samples, axis: Axis) -> Chart | None:
    values = axis.mean(samples.itl_ms)
    known = samples.column("itl_ms")
    known = known[np.isfinite(known)]
    if not known.size:
        return None
    # One step in a hundred may be off the scale: a pause must not flatten all the others.
    top = nice(float(np.quantile(values[np.isfinite(values)], 0.99)) * 1.1)
    half, most, worst = np.quantile(known, [0.5, 0.95, 1.0])
    note = f"milliseconds from token to token: median {half:.1f}, 95 % below {most:.1f}, longest {worst:,.1f}"
    shape = Shape("itl", "inter-token latency", line(axis, values, top), _words(values, _milliseconds))
    return Chart("speed", "Speed", note, [shape], y_ticks(top, _milliseconds))


def _attention(samples: Samples, axis: Axis) -> Chart | None:
    names = ("mass", "worst_mass", "overlap")
    values = [axis.mean(samples.column(name)) for name in names]
    if not np.isfinite(values[0]).any():
        return None
    labels = ("held by the picks, mean of layers", "the layer that holds least", "picked the step before as well")
    shapes = [
        Shape(name, label, line(axis, series, 1.0), _words(series, _share))
        for name, label, series in zip(names, labels, values, strict=True)
    ]
    note = "share of the attention that the picked rows hold, and how many of them are the same as a step ago"
    return Chart("attention", "Captured attention", note, shapes, y_ticks(1.0, _share))


def _over(total: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(total, by, out=np.full(len(total), np.nan), where=by > 0)


def _words(values: np.ndarray, form: Form) -> list[str]:
    return [form(value) if np.isfinite(value) else "" for value in values.tolist()]


def _per_second(value: float) -> str:
    for unit in ("B/s", "kB/s", "MB/s"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B/s" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB/s"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _share(value: float) -> str:
    return f"{value:.0%}"
