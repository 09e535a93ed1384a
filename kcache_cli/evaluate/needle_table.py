"""Rows of ``kcache eval needle`` as a table and a heat map of depth × length, full attention beside each N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kcache_cli.rows.chart import save
from kcache_cli.rows.formats import Column, Row, cell, origin, table
from kcache_cli.text import tokens

COMMAND = "kcache eval needle"
NAMES = {"kind", "depth", "sample"}
_MOST_MISSES = 20
_DARK = 0.4  # so far from the middle of the colour map figures on it are white
_Contender = tuple[str, int | None]


def markdown(rows: Sequence[Row]) -> str:
    """Mean scores by task and depth, a column for each length and N, and what was missed."""
    if not rows:
        return ""
    places = sorted({_place(row) for row in rows}, key=lambda place: (place[0], place[1] or 0))
    cells = {
        (kind, depth, contender, ctx): [
            row["score"]
            for row in rows
            if (_place(row), _contender(row), row["ctx"]) == ((kind, depth), contender, ctx)
        ]
        for kind, depth in places
        for contender in _contenders(rows)
        for ctx in _ctxs(rows)
    }
    columns: list[Column] = [
        ("task", lambda row: row["kind"]),
        ("depth", lambda row: "" if row["depth"] is None else f"{row['depth']:g}"),
    ]
    for contender in _contenders(rows):
        columns += [(f"{label(contender)} {ctx:,}", partial(_cell, cells, contender, ctx)) for ctx in _ctxs(rows)]
    return table([{"kind": kind, "depth": depth} for kind, depth in places], columns, _legend(rows))


def _cell(cells: dict[Any, list[float]], contender: _Contender, ctx: int, row: Row) -> str:
    scores = cells[row["kind"], row["depth"], contender, ctx]
    return f"{sum(scores) / len(scores):.2f}" if scores else ""


def _legend(rows: Sequence[Row]) -> list[str]:
    samples = len({row["sample"] for row in rows})
    how = f"{samples} sample{'s' if samples > 1 else ''} a cell; share of the right answer found in the reply"
    lines = [origin(rows[0], f"haystack: {rows[0]['text']}"), how]
    dense = {_case(row): row for row in rows if row["engine"] == "dense"}
    missed: list[Row] = []
    for contender in _contenders(rows)[1:]:
        mine = [row for row in rows if _contender(row) == contender and _case(row) in dense]
        right = [row for row in mine if dense[_case(row)]["score"] == 1]
        kept = [row for row in right if row["score"] == 1]
        won = sum(row["score"] > dense[_case(row)]["score"] for row in mine)
        same = sum(row["same_reply"] for row in mine)
        lines.append(
            f"{label(contender)}: right in {len(kept)} of the {len(right)} cases that full attention gets right; "
            f"better in {won}; the same reply in {same} of {len(mine)}"
        )
        missed += [row for row in mine if row["score"] < dense[_case(row)]["score"]]
    lines += [_miss(row, dense[_case(row)]) for row in missed[:_MOST_MISSES]]
    if len(missed) > _MOST_MISSES:
        lines.append(f"and {len(missed) - _MOST_MISSES} more")
    return lines


def _miss(row: Row, dense: Row) -> str:
    depth = "" if row["depth"] is None else f" · depth {row['depth']:g}"
    case = f"{row['kind']} · {row['ctx']:,}{depth} · sample {row['sample']}"
    said = cell(row["reply"])[:80]
    return f"worse: {label(_contender(row))} · {case}: {row['score']:.2f}, dense {dense['score']:.2f}: {said}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a heat map per task and N; the kind of file is that of the name."""
    from matplotlib.figure import Figure

    kinds, contenders, ctxs = sorted({row["kind"] for row in rows}), _contenders(rows), _ctxs(rows)
    heights = [len({row["depth"] for row in rows if row["kind"] == kind}) for kind in kinds]
    size = (1.2 + len(contenders) * (0.8 + 0.55 * len(ctxs)), 0.6 + 0.6 * len(kinds) + 0.3 * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    maps = figure.subplots(len(kinds), len(contenders), squeeze=False, height_ratios=heights)
    for number, axes in enumerate(maps.flat):
        kind, contender = kinds[number // len(contenders)], contenders[number % len(contenders)]
        mine = [row for row in rows if (row["kind"], _contender(row)) == (kind, contender)]
        _draw_map(axes, mine, ctxs)
        axes.set_title(f"{kind}, {label(contender)}", fontsize=8)
    figure.suptitle(f"{rows[0]['model']} · {rows[0]['dtype']} · share answered", fontsize=9)
    save(figure, path)


def _draw_map(axes: Any, rows: Sequence[Row], ctxs: Sequence[int]) -> None:
    depths = sorted({row["depth"] for row in rows}, key=lambda depth: depth or 0)
    values = [[_mean([row["score"] for row in rows if (row["depth"], row["ctx"]) == (depth, ctx)]) for ctx in ctxs]
              for depth in depths]  # fmt: skip
    axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            colour = "white" if abs(value - 0.5) > _DARK else "black"
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(ctxs)), [tokens(ctx) for ctx in ctxs], fontsize=7)
    axes.set_yticks(range(len(depths)), ["all" if depth is None else f"{depth:g}" for depth in depths], fontsize=7)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def in_words(rows: Sequence[Row]) -> str:
    """The scores of one haystack."""
    return ", ".join(f"{label(_contender(row))} {row['score']:.2f}" for row in rows)


def label(contender: _Contender) -> str:
    """A contender in a word."""
    return "dense" if contender[1] is None else f"N={contender[1]}"


def _contender(row: Row) -> _Contender:
    return row["engine"], row["topn"]


def _contenders(rows: Sequence[Row]) -> list[_Contender]:
    return sorted({_contender(row) for row in rows}, key=lambda pair: pair[1] or 0)


def _ctxs(rows: Sequence[Row]) -> list[int]:
    return sorted({row["ctx"] for row in rows})


def _place(row: Row) -> tuple[str, float | None]:
    return row["kind"], row["depth"]


def _case(row: Row) -> tuple[Any, ...]:
    return row["kind"], row["ctx"], row["depth"], row["sample"]
