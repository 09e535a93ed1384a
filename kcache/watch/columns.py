"""A frame as columns: plain values and one array per quantity, all layers together, which is how it travels.

:func:`read_frame` makes a :class:`~kcache.watch.frame.Frame` of columns that came from anywhere and checks all of it.

========== =============================== ==========================================================================
counts     ``[fields of Stats, layers]``   whole numbers; older recordings lack the last fields, which are 0 then
histogram  ``[layers, 128]``               picks per bucket, or fewer and wider ones: 64, 32, 16
held       the same                        attention that each bucket's picks hold, mean over heads, as a square root in
                                           1/255; not in all frames of a recording
overlap    ``[layers]``                    in 1/100, 255 for none
heads      ``[layers]``                    entries of ``mass`` that are this layer's, 0 for none
mass       ``[sum of heads]``              in 1/100
shapes     ``[layers, 2]``                 S and Hkv of the layer's picks, zeros for none
rows       ``[sum of S * Hkv]``            how many picks each head of each sequence has
picks      ``[sum of rows]``               ascending per head, as differences from the one before
weights    ``[sum of rows]``               attention that each holds, like ``held``; not in recordings
========== =============================== ==========================================================================
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar, get_args

import numpy as np

from kcache.errors import FormatError
from kcache.telemetry import LayerKind, Stats, StepMode
from kcache.watch.codec import Message
from kcache.watch.frame import (
    MOST_BUCKETS,
    Frame,
    Info,
    LayerFrame,
    Mark,
    Memory,
    Phase,
    Role,
    SequenceFrame,
    Speed,
    bucket_tokens,
)

WIDTHS = (MOST_BUCKETS, 64, 32, 16)
PARTS = 100
"""A share is sent as a whole number of so many parts."""
ROOTS = 255
"""The square root of a share that may be small is sent as a whole number of so many parts."""
NO_SHARE = 255
PICKS = ("picks", "shapes", "rows", "weights")
"""The columns that make up exact picks; a frame may come without."""
SOMETIMES = (*PICKS, "held")
"""What a recording has in some frames only."""
KINDS: tuple[LayerKind, ...] = get_args(LayerKind)
MODES: tuple[StepMode, ...] = get_args(StepMode)
PHASES: tuple[Phase, ...] = get_args(Phase)
ROLES: tuple[Role, ...] = get_args(Role)
STATS = tuple(item.name for item in fields(Stats))

_FEWEST_STATS = 12
_LARGEST = 2**62
_MOST_LAYERS = 4096
_MOST_PICKS = 2**24
_SUMMED = tuple(name for name in STATS if name not in ("steps", "tokens"))
Value = TypeVar("Value")


def read_frame(columns: Message) -> Frame:
    """Make a frame of columns.

    Raises
    ------
    FormatError
        Naming the column that is not as it should be.
    """
    kinds, modes = _choices(columns, "kinds", KINDS), _choices(columns, "modes", MODES)
    count, tokens = len(kinds), whole(columns, "tokens")
    columns_given = (getattr(columns.get("histogram"), "shape", ()) or (0,))[-1]
    if columns_given not in WIDTHS:
        raise FormatError(f"histogram: {columns_given} columns")
    width = bucket_tokens(tokens, columns_given)
    buckets = -(-tokens // width)
    counts = _counts(columns, count)
    heat = array(columns, "histogram", (count, columns_given)).astype(np.uint32)
    overlap = array(columns, "overlap", (count,))
    if len(modes) != count:
        raise FormatError("modes: not one per layer")
    masses, picks = _masses(columns, count), _picks(columns, count, tokens)
    held = _squares(columns, "held", heat.shape)
    stats = [Stats(*map(int, values)) for values in counts.T]
    layers = tuple(
        LayerFrame(
            index,
            kinds[index],
            modes[index],
            stats[index],
            None if overlap[index] > PARTS else float(overlap[index]) / PARTS,
            frozen(heat[index, :buckets]),
            masses[index],
            None if held is None or masses[index] is None else frozen(held[index, :buckets]),
            *picks[index],
        )
        for index in range(count)
    )
    sequences, marks, job = _rows(columns, "sequences", 4), _rows(columns, "marks", 2), columns.get("job")
    return Frame(
        number=whole(columns, "number"),
        time_s=real(columns, "time"),
        run=whole(columns, "run"),
        step=max((item.steps for item in stats), default=0),
        phase=_choice(columns, "phase", PHASES),
        batch=whole(columns, "batch"),
        observed=whole(columns, "observed"),
        tokens=tokens,
        bucket_tokens=width,
        layers=layers,
        totals=_total(counts),
        memory=Memory(*_optional(columns, "memory", 7, whole_or_none)),
        speed=Speed(*_optional(columns, "speed", 3, real_or_none)),
        marks=tuple(Mark(start, ROLES[role == 1]) for start, role in marks),
        sequences=tuple(SequenceFrame(pad, held, made, bool(done)) for pad, held, made, done in sequences),
        job=None if job is None else (_rows({"job": [job]}, "job", 2)[0][0], _rows({"job": [job]}, "job", 2)[0][1]),
    )


def _counts(columns: Message, count: int) -> np.ndarray:
    known = len(STATS)
    given = (getattr(columns.get("counts"), "shape", ()) or (known,))[0]
    if not _FEWEST_STATS <= given <= known:
        given = known
    counts = np.zeros((known, count), np.int64)
    counts[:given] = array(columns, "counts", (given, count))
    return counts


def _total(counts: np.ndarray) -> Stats:
    values = {
        name: int(row.sum() if name in _SUMMED else row.max(initial=0)) for name, row in zip(STATS, counts, strict=True)
    }
    return Stats(**values)


def _masses(columns: Message, count: int) -> list[np.ndarray | None]:
    heads = array(columns, "heads", (count,), most=_MOST_PICKS)
    ends = np.cumsum(heads)
    mass = array(columns, "mass", (int(ends[-1]) if count else 0,), most=PARTS).astype(np.float32) / PARTS
    return [frozen(mass[end - size : end]) if size else None for size, end in zip(heads, ends, strict=True)]


def _squares(columns: Message, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Shares that were sent as roots; None where they were not."""
    if name not in columns:
        return None
    shares: np.ndarray = (array(columns, name, shape, most=ROOTS) / ROOTS).astype(np.float32) ** 2
    return shares


def _picks(columns: Message, count: int, tokens: int) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Picks and weights of each layer."""
    if "picks" not in columns:
        return [(None, None)] * count
    shapes = array(columns, "shapes", (count, 2), most=_MOST_PICKS)
    heads = [int(sequences) * int(each) for sequences, each in shapes]
    rows = array(columns, "rows", (sum(heads),), most=_MOST_PICKS)
    flat = array(columns, "picks", (int(rows.sum()),), most=2**31)
    weights = _squares(columns, "weights", flat.shape)
    ends = np.cumsum(rows)
    run = np.concatenate([[0], np.cumsum(flat)])
    positions = run[1:] - np.repeat(run[ends - rows], rows)
    if positions.size and positions.max() >= tokens:
        raise FormatError("picks: positions outside of the context")
    found: list[tuple[np.ndarray | None, np.ndarray | None]] = []
    first = 0
    for shape, size in zip(shapes, heads, strict=True):
        lengths = rows[first : first + size]
        if size * int(lengths.max(initial=0)) > _MOST_PICKS:
            raise FormatError("rows: too many picks in a layer")
        start, end = (int(ends[first] - rows[first]), int(ends[first + size - 1])) if size else (0, 0)
        table = _table(positions[start:end].astype(np.int32), shape, lengths, -1)
        found.append((table, None if weights is None else _table(weights[start:end], shape, lengths, 0)))
        first += size
    return found


def _table(flat: np.ndarray, shape: np.ndarray, lengths: np.ndarray, fill: int) -> np.ndarray | None:
    """Rows of ``lengths``, filled up, as ``[*shape, N]``; None where there is nothing."""
    table = np.full((len(lengths), int(lengths.max(initial=0))), fill, flat.dtype)
    table[np.arange(table.shape[1]) < lengths[:, None]] = flat
    return frozen(table.reshape(*shape, -1)) if table.size else None


# -- checked reading -----------------------------------------------------------------------------------------------


def whole(columns: Message, name: str) -> int:
    """A whole number from 0 on."""
    value = columns.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise FormatError(f"{name}: a whole number was expected, got {value!r:.40}")
    return value


def real(columns: Message, name: str) -> float:
    """A finite number."""
    value = columns.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise FormatError(f"{name}: a number was expected, got {value!r:.40}")
    return float(value)


def text(columns: Message, name: str) -> str:
    """A string."""
    value = columns.get(name)
    if not isinstance(value, str):
        raise FormatError(f"{name}: text was expected, got {value!r:.40}")
    return value


def whole_or_none(columns: Message, name: str) -> int | None:
    """A whole number, or nothing."""
    return None if columns.get(name) is None else whole(columns, name)


def real_or_none(columns: Message, name: str) -> float | None:
    """A number, or nothing."""
    return None if columns.get(name) is None else real(columns, name)


def array(columns: Message, name: str, shape: tuple[int, ...], most: int = _LARGEST // _MOST_LAYERS) -> np.ndarray:
    """An array of whole numbers from 0 to ``most``, int64, of this shape."""
    value = columns.get(name)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.shape != shape:
        raise FormatError(f"{name}: whole numbers of shape {shape} were expected, got {getattr(value, 'shape', value)}")
    if value.size and not 0 <= int(value.min()) <= int(value.max()) <= most:
        raise FormatError(f"{name}: holds a number that cannot be")
    return value.astype(np.int64)


def frozen(values: np.ndarray) -> np.ndarray:
    """The same array, read-only."""
    values.flags.writeable = False
    return values


def _choices(columns: Message, name: str, names: tuple[Value, ...]) -> list[Value]:
    codes = columns.get(name)
    if not isinstance(codes, bytes) or len(codes) > _MOST_LAYERS or any(code >= len(names) for code in codes):
        raise FormatError(f"{name}: unknown codes")
    return [names[code] for code in codes]


def _choice(columns: Message, name: str, names: tuple[Value, ...]) -> Value:
    code = whole(columns, name)
    if code >= len(names):
        raise FormatError(f"{name}: unknown code {code}")
    return names[code]


def _rows(columns: Message, name: str, width: int) -> list[list[int]]:
    rows = columns.get(name)
    if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != width for row in rows):
        raise FormatError(f"{name}: a list of lists of {width} numbers was expected")
    return [[whole({name: value}, name) for value in row] for row in rows]


def _optional(columns: Message, name: str, size: int, read: Any) -> list[Any]:
    values = columns.get(name)
    if not isinstance(values, list) or len(values) != size:
        raise FormatError(f"{name}: {size} values were expected")
    return [read({name: value}, name) for value in values]


def read_info(message: Message) -> Info:
    """Make an :class:`Info` of a message.

    Raises
    ------
    FormatError
        Naming the field that is not as it should be.
    """
    policy, environment = message.get("policy"), message.get("environment")
    if not isinstance(policy, dict) or not isinstance(environment, dict):
        raise FormatError("policy, environment: maps were expected")
    if not all(value is None or isinstance(value, (str, int, float)) for value in policy.values()):
        raise FormatError("policy: plain values were expected")
    return Info(
        pid=whole(message, "pid"),
        command=text(message, "command"),
        model=text(message, "model"),
        started_s=real(message, "started_s"),
        device=text(message, "device"),
        host_only=message.get("host_only") is True,
        weights_bytes=whole(message, "weights_bytes"),
        context_length=whole_or_none(message, "context_length"),
        link_gb_s=real_or_none(message, "link_gb_s"),
        policy={str(name): value for name, value in policy.items()},
        environment={str(name): str(value) for name, value in environment.items()},
    )
