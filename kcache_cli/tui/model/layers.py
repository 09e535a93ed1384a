"""The layer table as rows: what each layer holds, picks and moves; sorted and filtered."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from kcache.errors import InputError
from kcache.watch.frame import LayerFrame, since
from kcache_cli.tui.model.moment import Moment

SORTS = ("layer", "attn", "reuse", "hits", "rows", "link", "device", "host")
_COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_TERM = re.compile(r"(\w+)\s*(<=|>=|<|>|=)\s*(\d+\.?\d*|\.\d+)\s*([kmg%]?)", re.I)
_UNITS = {"": 1.0, "%": 0.01, "k": 1024.0, "m": 1024.0**2, "g": 1024.0**3}


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer; ``None`` where there is nothing to tell.

    Attributes
    ----------
    attn : float or None
        Share of attention its picks hold, mean over query heads.
    reuse : float or None
        Share of its picks that the step before had picked as well.
    hits : float or None
        Share of its rows found in the hot set.
    rows : float or None
        V rows it fetched per step, lately.
    link : float or None
        Bytes to the device per step, lately.
    device, host : int
        Bytes held.
    bound : float or None
        How far its output can be from exact attention, in units of the largest norm of a V row.
    """

    layer: int
    kind: str
    mode: str
    attn: float | None
    reuse: float | None
    hits: float | None
    rows: float | None
    link: float | None
    device: int
    host: int
    bound: float | None


def layer_rows(moment: Moment) -> list[LayerRow]:
    """A row for each layer of a moment, in their order."""
    frame, earlier = moment.frame, moment.past.earlier
    if frame is None:
        return []
    follows = earlier is not None and earlier.run == frame.run and len(earlier.layers) == len(frame.layers)
    before = earlier.layers if follows and earlier is not None else (None,) * len(frame.layers)
    return [_row(moment, layer, then) for layer, then in zip(frame.layers, before, strict=True)]


def _row(moment: Moment, layer: LayerFrame, before: LayerFrame | None) -> LayerRow:
    stats = layer.stats
    rows = link = None
    hits = stats.hot_hits / stats.rows_fetched if stats.hot_hits and stats.rows_fetched else None
    if before is not None:
        moved = since(before.stats, stats)
        if moved.steps:
            rows, link = moved.rows_fetched / moved.steps, moved.bytes_h2d / moved.steps
    mass = None if layer.mass is None else float(layer.mass.mean())
    return LayerRow(
        layer.index,
        layer.kind,
        layer.mode,
        mass,
        layer.overlap,
        hits,
        rows,
        link,
        stats.device_bytes,
        stats.host_bytes,
        error_bound(layer, str(moment.info.policy.get("tail", "lowrank"))),
    )


def error_bound(layer: LayerFrame, tail: str) -> float | None:
    """How far the layer's output can be from exact attention at most, over the largest norm of its V rows.

    What was not picked holds ``1 - mass``. Dropped, it is missing; with averages of V or nothing but rescaling in its
    place, the output errs by that weight times the distance of two averages of V rows, at most twice the largest
    norm. Mean over query heads; exact layers err by 0.
    """
    if layer.mode == "dense":
        return 0.0
    if layer.mass is None or layer.mode != "topn":
        return None
    missing = float((1 - layer.mass).mean())
    return missing if tail == "none" else 2 * missing


def sort_rows(rows: list[LayerRow], by: str, reverse: bool = False) -> list[LayerRow]:
    """Sort: layers ascending, all else with the largest first; what is not known comes last either way."""
    known = [row for row in rows if getattr(row, by) is not None]
    unknown = [row for row in rows if getattr(row, by) is None]
    descending = (by != "layer") != reverse
    return sorted(known, key=lambda row: (getattr(row, by), -row.layer), reverse=descending) + unknown


def parse_filter(text: str) -> Callable[[LayerRow], bool]:
    """Make a test of words like ``tiered``, ``topn``, ``attn<0.9``, ``host>1m``, ``layer>=20``; all must hold.

    Raises
    ------
    InputError
        If a word is no column, kind or mode.
    """
    tests: list[Callable[[LayerRow], bool]] = []
    for word in re.sub(r"\s*(<=|>=|<|>|=)\s*", r"\1", text).split():
        tests.append(_test(word))
    return lambda row: all(test(row) for test in tests)


def _test(word: str) -> Callable[[LayerRow], bool]:
    if word.isdigit():
        number = int(word)
        return lambda row: row.layer == number
    match = _TERM.fullmatch(word)
    if match is None:
        wanted = word.lower()
        if not any(name.startswith(wanted) for name in ("tiered", "resident", "stock", *_MODES)):
            raise InputError(f"no such filter: {word}; try tiered, resident, topn, attn<0.9 or host>1m")
        return lambda row: row.kind.startswith(wanted) or row.mode.startswith(wanted)
    name, sign, number_text, unit = match[1].lower(), match[2], match[3], match[4].lower()
    if name not in SORTS:
        raise InputError(f"no such column: {name}; they are {', '.join(SORTS)}")
    compare, value = _COMPARE[sign], float(number_text) * _UNITS[unit]

    def test(row: LayerRow) -> bool:
        found = getattr(row, name)
        return found is not None and bool(compare(found, value))

    return test


_MODES = ("topn", "dense", "prefill", "idle")
