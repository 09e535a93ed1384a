"""Figures, bars and tables of a run: values made ready for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kcache.watch.frame import Frame
from kcache_cli.report.heat import Maps
from kcache_cli.report.samples import Samples
from kcache_cli.report.timeline import clock
from kcache_cli.text import one_line, size

_LONGEST_NAMES = 80


@dataclass(frozen=True)
class Figure:
    """A number to see first, what it is, and a remark."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, what it sorts by, and how full its bar is, 0 to 100."""

    text: str
    key: float | str
    bar: float | None = None


def figures(samples: Samples, frame: Frame, maps: Maps | None) -> list[Figure]:
    """The figures at the top."""
    totals = frame.totals
    found = [Figure(f"{frame.tokens:,}", "tokens in the cache", f"{frame.step:,} decode steps")]
    if totals.full_kv_bytes:
        share = totals.device_bytes / totals.full_kv_bytes
        found.append(
            Figure(
                size(totals.device_bytes),
                "on the device",
                f"{share:.0%} of a full KV cache ({size(totals.full_kv_bytes)})",
            )
        )
        found.append(Figure(size(totals.host_bytes), "on the host", "V that left the device"))
    steps, decoding = sum(samples.steps), np.asarray(samples.steps) > 0
    if steps:
        h2d = float(samples.column("h2d")[decoding].sum()) / steps
        hits, rows = sum(samples.hits), sum(samples.rows)
        note = f"{hits / rows:.0%} of rows were hot" if hits else f"{rows / steps:,.0f} rows"
        found.append(Figure(size(h2d), "over the link per step", note))
    latency = samples.column("itl_ms")
    latency = latency[np.isfinite(latency)]
    if latency.size:
        rate = "" if frame.speed.tok_s is None else f"{frame.speed.tok_s:.1f} tok/s at the end"
        found.append(Figure(f"{np.median(latency):.1f} ms", "from token to token, median", rate))
    if frame.speed.ttft_ms is not None:
        found.append(Figure(clock(frame.speed.ttft_ms / 1e3), "to the first token", "of the latest prompt"))
    mass = samples.column("mass")
    if maps is not None and np.isfinite(mass).any():
        verb = "would hold" if maps.would else "hold"
        found.append(Figure(f"{np.nanmean(mass):.0%}", f"of attention the picks {verb}", "mean of layers and steps"))
    return found


def job_figures(samples: Samples, ends: list[tuple[int, Frame]]) -> list[Figure]:
    """The figures of a job of several runs, of which the others on the page know one."""
    if len(ends) < 2:
        return []
    made = sum(each.completion_tokens for _, frame in ends for each in frame.sequences)
    job = ends[-1][1].job
    runs = f"{len(ends):,} runs, {clock(samples.seconds[-1])}"
    found = [] if job is None else [Figure(f"{job[0]:,} of {job[1]:,}", "prompts are done", runs)]
    return [*found, Figure(f"{made:,}", "new tokens", "of the runs that were recorded" if found else runs)]


def memory_bars(frame: Frame, weights_bytes: int) -> dict[str, Any]:
    """The cache in both tiers beside what a full one would take: parts in percent of the longest bar."""
    totals = frame.totals
    longest = max(totals.device_bytes, totals.host_bytes, totals.full_kv_bytes, 1)
    device = [
        ("device_k", "K", totals.k_bytes),
        ("device_v", "resident V", totals.resident_v_bytes),
        ("overhead", "policy overhead", max(0, totals.overhead_bytes - totals.hot_bytes)),
        ("hot", "hot rows", totals.hot_bytes),
    ]
    return {
        "device": [_part(*part, longest) for part in device if part[2]],
        "host": [_part("host_v", "V", totals.host_bytes, longest)] if totals.host_bytes else [],
        "full": [_part("ghost", "full KV cache", totals.full_kv_bytes, longest)],
        "device_bytes": totals.device_bytes,
        "weights": weights_bytes,
    }


def _part(style: str, label: str, count: int, longest: int) -> dict[str, Any]:
    return {"style": style, "label": label, "size": size(count), "share": 100 * count / longest}


_HEADINGS = ("layer", "kind", "attends", "device", "host", "link in", "link out", "rows", "hot", "attention", "reuse")


def layer_table(frame: Frame) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and a row per layer; a column in which no layer has anything is left out."""
    rows = _layer_rows(frame)
    kept = [at for at in range(len(_HEADINGS)) if any(row[at].text for row in rows)]
    return [_HEADINGS[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _layer_rows(frame: Frame) -> list[list[Cell]]:
    most = {
        name: max((getattr(layer.stats, name) for layer in frame.layers), default=0)
        for name in ("device_bytes", "host_bytes", "bytes_h2d", "bytes_d2h", "rows_fetched")
    }
    rows = []
    for layer in frame.layers:
        stats = layer.stats
        cells = [Cell(str(layer.index), layer.index), Cell(layer.kind, layer.kind), Cell(layer.mode, layer.mode)]
        for name in ("device_bytes", "host_bytes", "bytes_h2d", "bytes_d2h"):
            value = getattr(stats, name)
            cells.append(Cell(size(value), value, 100 * value / most[name] if most[name] else 0))
        fetched = stats.rows_fetched
        cells.append(Cell(f"{fetched:,}", fetched, 100 * fetched / most["rows_fetched"] if fetched else 0))
        cells.append(_share(stats.hot_hits / fetched if stats.hot_hits else None))
        cells.append(_share(None if layer.mass is None else float(layer.mass.mean())))
        cells.append(_share(layer.overlap))
        rows.append(cells)
    return rows


def _share(value: float | None) -> Cell:
    return Cell("", -1.0) if value is None else Cell(f"{value:.2f}", round(value, 4), 100 * value)


def turn_rows(frame: Frame) -> list[dict[str, Any]]:
    """Turns of the run that is shown."""
    starts = [*(mark.start for mark in frame.marks), frame.tokens]
    return [
        {"role": mark.role, "start": mark.start, "end": end - 1, "tokens": end - mark.start}
        for mark, end in zip(frame.marks, starts[1:], strict=True)
        if end > mark.start
    ]


def run_rows(samples: Samples, ends: list[tuple[int, Frame]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """What each cache of the process did; a batch job makes one for every batch, and its prompts have ``names``."""
    runs = np.asarray(samples.run)
    edges = [0, *(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(runs)]
    rows = []
    for (start, end), (_, frame), called in zip(pairwise(edges), ends, names, strict=True):
        latency = samples.column("itl_ms")[start:end]
        latency = latency[np.isfinite(latency)]
        rows.append(
            {
                "run": frame.run,
                "sequences": f"{frame.began}: {_joined(called)}" if called else frame.began,
                "new": f"{sum(each.completion_tokens for each in frame.sequences):,}",
                "tokens": f"{frame.tokens:,}",
                "steps": f"{frame.step:,}",
                "device": size(frame.totals.device_bytes),
                "host": size(frame.totals.host_bytes),
                "h2d": size(frame.totals.bytes_h2d),
                "itl": f"{np.median(latency):.1f} ms" if latency.size else "",
                "lasted": clock(samples.seconds[end - 1] - samples.seconds[start]),
            }
        )
    return rows


def _joined(names: Sequence[str]) -> str:
    """Names in a cell, of many the first."""
    told = ", ".join(one_line(name) for name in names)
    return told if len(told) <= _LONGEST_NAMES else f"{told[: _LONGEST_NAMES - 1]}…"
