"""A chart of the rows: tokens per second against context, a line per engine, or bars when there is one context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kcache_cli.bench.table import called
from kcache_cli.rows.chart import save
from kcache_cli.rows.formats import Row
from kcache_cli.text import tokens


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows that have figures; the kind of file is that of the name."""
    from matplotlib.figure import Figure

    lines = _lines(rows)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    contexts = sorted({ctx for points in lines.values() for ctx in points})
    if len(contexts) > 1:
        _draw_lines(axes, lines, contexts)
    else:
        _draw_bars(axes, lines)
    axes.set_title(_title(rows), fontsize=9)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    save(figure, path)


def _lines(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Per engine and batch, tokens per second by context: median, lowest and highest turn."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    many = len({row["batch"] for row in rows}) > 1
    for row in rows:
        if row.get("decode_tok_s") is None:
            continue
        name = called(row) + (f", batch {row['batch']}" if many else "")
        scale = 1e3 * row["batch"]
        spread = scale / row["decode_ms_high"], scale / row["decode_ms_low"]
        found.setdefault(name, {})[row["ctx"]] = row["decode_tok_s"], *spread
    return found


def _draw_lines(axes: Any, lines: dict[str, dict[int, tuple[float, float, float]]], contexts: list[int]) -> None:
    for name, points in lines.items():
        places = sorted(points)
        (line,) = axes.plot(places, [points[ctx][0] for ctx in places], marker="o", markersize=4, label=name)
        low, high = ([points[ctx][side] for ctx in places] for side in (1, 2))
        axes.fill_between(places, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [tokens(ctx) for ctx in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _draw_bars(axes: Any, lines: dict[str, dict[int, tuple[float, float, float]]]) -> None:
    names = list(lines)
    values = [next(iter(points.values())) for points in lines.values()]
    places = list(range(len(names)))
    medians = [median for median, _, _ in values]
    below = [max(0.0, median - low) for median, low, _ in values]
    above = [max(0.0, high - median) for median, _, high in values]
    axes.barh(places, medians, xerr=(below, above), capsize=3, color="tab:blue", alpha=0.8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second")


def _title(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    first = rows[0]
    device = first.get("env", {}).get("device", first.get("device", ""))
    contexts = {row["ctx"] for row in rows}
    at = f" · context {next(iter(contexts)):,}" if len(contexts) == 1 else ""
    return f"{first['model']} · {first.get('dtype', '')} · {device}{at}"
