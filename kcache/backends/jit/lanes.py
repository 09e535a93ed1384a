"""Products with rows of K and V, a vector register at a time, as LLVM is to emit them.

Left to itself LLVM takes 64 words of a row at a time, four registers, and what is less in small steps: rows of 64 bf16
are 32 words. Here a block of a row is one register wide, sums of four rows stay in registers for up to four query
heads, and are added up across lanes for the four rows together.

Rows are read as :mod:`~kcache.backends.jit.rows` says: two halves, contiguous in registers. Shapes: query
``[G, 2, D / 2]`` fp32, rows ``[count, words]`` uint32 of two bf16 or fp32, scores and weights ``[G, >= count]`` fp32.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from kcache.backends.jit.bits import intrinsic

ROWS = 4
"""Rows that are scored together."""
HEADS = 4
"""Most query heads that share a look at a row."""


def _lanes() -> int:
    """Numbers in a register of this machine."""
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on this system
        return 4
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


LANES = _lanes()
_AHEAD = 64
"""How many rows ahead of those at hand memory is asked for: the processor does not look past the end of a page."""
_F32, _I32, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_FLOATS, _WORDS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class Array:
    """The address arithmetic of an array argument."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        array = context.make_array(kind)(context, builder, value=value)
        self._builder, self._itemsize = builder, kind.dtype.bitwidth // 8
        self._strides = cgutils.unpack_tuple(builder, array.strides)
        self._base = builder.ptrtoint(array.data, self._strides[0].type)
        self.shape = cgutils.unpack_tuple(builder, array.shape)

    def at(self, kind: Any, *index: Any) -> Any:
        """Pointer to a ``kind`` that begins at ``index``."""
        builder, place = self._builder, self._base
        for stride, step in zip(self._strides, index, strict=True):
            place = builder.add(place, builder.mul(stride, step))
        return builder.inttoptr(place, kind.as_pointer())

    def load(self, kind: Any, *index: Any) -> Any:
        """What is there, at no more than an item's alignment."""
        return self._builder.load(self.at(kind, *index), align=self._itemsize)

    def store(self, value: Any, *index: Any) -> None:
        """Write it there."""
        self._builder.store(value, self.at(value.type, *index), align=self._itemsize)


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """A register of a ``kind`` that holds one value in every lane."""
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _halves(builder: Any, rows: Array, kind: Any, row: Any, at: Any, half: Any) -> tuple[Any, Any]:
    """The two halves of block ``at`` of a row, fp32."""
    if kind.dtype == types.uint32:
        words = rows.load(_WORDS, row, at)
        even = builder.shl(words, ir.Constant(_WORDS, [16] * LANES))
        odd = builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * LANES))
        return builder.bitcast(even, _FLOATS), builder.bitcast(odd, _FLOATS)
    return rows.load(_FLOATS, row, at), rows.load(_FLOATS, row, builder.add(half, at))


def _ask_for(builder: Any, place: Any) -> None:
    """Have a cache line brought in, wherever that is: nothing is read there, so it may be past the end."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_I8.as_pointer()], kind)
    builder.call(prefetch, [place, *(ir.Constant(_I32, flag) for flag in (0, 3, 1))])


def _add_product(builder: Any, place: Any, a: Any, b: Any) -> None:
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)


def _added_up(builder: Any, sums: list[Any]) -> Any:
    """The four sums of four registers, ``<4 x float>``: neighbours are added while the registers are joined."""

    def joined(a: Any, b: Any, pick: list[int]) -> Any:
        lanes = [first + at for first in range(0, LANES, 4) for at in (0, 1, 2, 3)]
        index = [lane - lane % 4 + pick[lane % 4] % 4 + (LANES if pick[lane % 4] >= 4 else 0) for lane in lanes]
        return builder.shuffle_vector(a, b, ir.Constant(_WORDS, index))

    def pair(a: Any, b: Any, low: list[int], high: list[int]) -> Any:
        return builder.fadd(joined(a, b, low), joined(a, b, high))

    a, b = (pair(sums[at], sums[at + 1], [0, 4, 1, 5], [2, 6, 3, 7]) for at in (0, 2))
    total, width = pair(a, b, [0, 1, 4, 5], [2, 3, 6, 7]), LANES
    while width > 4:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, width), list(range(first, first + width))) for first in (0, width))
        total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
    return total


def _score_four(heads: int) -> Any:
    @intrinsic
    def score_four(context: Any, query: Any, rows: Any, scores: Any, g: Any, row: Any) -> Any:
        """Scores of ``ROWS`` rows from ``row`` on and of ``heads`` query heads from ``g`` on."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            q, k, s = (Array(context, builder, signature.args[at], args[at]) for at in range(3))
            intp, half = args[3].type, q.shape[2]
            number = [ir.Constant(intp, at) for at in range(max(ROWS, HEADS))]
            sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(ROWS)] for _ in range(heads)]
            for place in itertools.chain(*sums):
                builder.store(ir.Constant(_FLOATS, [0.0] * LANES), place)
            with cgutils.for_range_slice(builder, number[0], half, ir.Constant(intp, LANES), intp) as (at, _):
                pairs = [
                    _halves(builder, k, signature.args[1], builder.add(args[4], number[nth]), at, half)
                    for nth in range(ROWS)
                ]
                for nth in range(ROWS):
                    _ask_for(builder, k.at(_I8, builder.add(args[4], ir.Constant(intp, nth + _AHEAD)), at))
                for head in range(heads):
                    for part in range(2):
                        asked = q.load(_FLOATS, builder.add(args[3], number[head]), number[part], at)
                        for nth in range(ROWS):
                            place = sums[head][nth]
                            _add_product(builder, place, asked, pairs[nth][part])
            for head in range(heads):
                total = _added_up(builder, [builder.load(place) for place in sums[head]])
                s.store(total, builder.add(args[3], number[head]), args[4])
            return context.get_dummy_value()

        return types.void(query, rows, scores, types.intp, types.intp), generate

    return score_four


def _weigh_in(heads: int) -> Any:
    @intrinsic
    def weigh_in(context: Any, weights: Any, rows: Any, out: Any, g: Any, at: Any, start: Any, stop: Any) -> Any:
        """Add rows ``start`` to ``stop``, weighed, to block ``at`` of ``heads`` outputs from ``g`` on."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            w, v, o = (Array(context, builder, signature.args[nth], args[nth]) for nth in range(3))
            g, at, start, stop = args[3:]
            number = [ir.Constant(g.type, nth) for nth in range(HEADS)]
            places = [(builder.add(g, number[head]), number[part], at) for head in range(heads) for part in range(2)]
            sums = [cgutils.alloca_once(builder, _FLOATS) for _ in places]
            for place, held in zip(places, sums, strict=True):
                builder.store(o.load(_FLOATS, *place), held)
            with cgutils.for_range_slice(builder, start, stop, number[1], g.type) as (row, _):
                pair = _halves(builder, v, signature.args[1], row, at, o.shape[2])
                _ask_for(builder, v.at(_I8, builder.add(row, ir.Constant(g.type, _AHEAD)), at))
                for head in range(heads):
                    weight = splat(builder, w.load(_F32, builder.add(g, number[head]), row), _FLOATS)
                    for part in range(2):
                        _add_product(builder, sums[2 * head + part], weight, pair[part])
            for place, held in zip(places, sums, strict=True):
                o.store(builder.load(held), *place)
            return context.get_dummy_value()

        return types.void(weights, rows, out, *[types.intp] * 4), generate

    return weigh_in


@intrinsic
def largest_of_blocks(context: Any, values: Any, count: Any) -> Any:
    """The largest of the first ``count`` fp32 numbers, a multiple of ``LANES``, or ``-inf``; NaN is passed over."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers, intp = Array(context, builder, signature.args[0], args[0]), args[1].type
        held = cgutils.alloca_once(builder, _FLOATS)
        builder.store(ir.Constant(_FLOATS, [float("-inf")] * LANES), held)
        steps = ir.Constant(intp, 0), args[1], ir.Constant(intp, LANES)
        with cgutils.for_range_slice(builder, *steps, intp) as (at, _):
            block, peaks = numbers.load(_FLOATS, at), builder.load(held)
            builder.store(builder.select(builder.fcmp_ordered(">", block, peaks), block, peaks), held)
        lanes = [builder.extract_element(builder.load(held), ir.Constant(_I32, lane)) for lane in range(LANES)]
        while len(lanes) > 1:
            pairs = zip(lanes[::2], lanes[1::2], strict=True)
            lanes = [builder.select(builder.fcmp_ordered(">", a, b), a, b) for a, b in pairs]
        return lanes[0]

    return types.float32(values, types.intp), generate


score_one_head, score_two_heads, score_three_heads, score_four_heads = map(_score_four, range(1, HEADS + 1))
weigh_in_one, weigh_in_two, weigh_in_three, weigh_in_four = map(_weigh_in, range(1, HEADS + 1))
