"""Tiles of the products of a prompt's attention, as LLVM is to emit them: bf16 in, fp32 sums in registers.

An instruction of AVX-512 BF16 multiplies the pairs of numbers in 16 words with those of 16 others and adds both
products to 16 sums. A tile is six queries by four registers of sums, which with what they are multiplied by fill all
registers. What is multiplied lies in the order in which it is read: :mod:`~kcache.backends.jit.prefill` packs it.

Shapes: query words ``[Q, D / 2]`` (two neighbouring numbers of a row), K words ``[L / 64, D / 2, 64]``, V words
``[L / 2, Dv]`` (a number of two neighbouring rows), scores ``[Q, K]`` fp32, weights ``[Q, K]`` bf16.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config

from kcache.backends.jit.bits import intrinsic
from kcache.backends.jit.lanes import Array, splat

QUERIES = 6
"""Rows of a tile."""
LANES = 16
REGISTERS = 4
"""Columns of a tile, in registers."""
COLUMNS = LANES * REGISTERS
_F32, _I32 = ir.FloatType(), ir.IntType(32)
_FLOATS, _WORDS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_POWERS = (
    1.5403530393381608e-4, 1.3333558146428443e-3, 9.618129107628477e-3, 5.5504108664821576e-2, 2.402265069591007e-1,
    6.931471805599453e-1, 1.0,
)  # fmt: skip
_LEAST = -140.0
"""2 to less is 0."""


def can_assemble() -> bool:
    """Whether this machine has AVX-512 BF16. One with AMX does better with the products of torch, which use that.

    No where Numba compiles for another machine than this one: LLVM ends the process over instructions it has not got.
    """
    target: Any = config
    if target.CPU_NAME or target.CPU_FEATURES or not target.ENABLE_AVX:
        return False
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on this system
        return False
    return bool(features.get("avx512bf16") and features.get("avx512f") and not features.get("amx-bf16"))


def let_assemble() -> None:
    """Let LLVM read the instructions that are written here by name; without, it ends the process."""
    binding.initialize_native_asmparser()


def _times(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _WORDS, _WORDS])
    return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, a, b], False)


def _times_power(builder: Any, a: Any, exponent: Any) -> Any:
    """``a`` times 2 to a whole exponent, however small."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS])
    return builder.asm(kind, "vscalefps $2, $1, $0", "=v,v,v", [a, exponent], False)


def _rounded(builder: Any, numbers: Any) -> Any:
    return builder.asm(ir.FunctionType(_HALVES, [_FLOATS]), "vcvtneps2bf16 $1, $0", "=v,v", [numbers], False)


def _call(builder: Any, name: str, *args: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _number(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


def _across(builder: Any, numbers: Any, combine: Any) -> Any:
    lanes = [builder.extract_element(numbers, ir.Constant(_I32, lane)) for lane in range(LANES)]
    while len(lanes) > 1:
        lanes = [combine(a, b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0]


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _add_up(builder: Any, sums: list[list[Any]], count: Any, step: Any, row: Any, words: Any, column: Any) -> None:
    """Add ``count`` products: a word of each row, by ``row(i, at)``, times the registers ``column(j, at)`` of words."""
    zero, one = (ir.Constant(count.type, number) for number in (0, 1))
    with cgutils.for_range_slice(builder, zero, count, one, count.type) as (at, _):
        columns = [words.load(_WORDS, *column(nth, at)) for nth in range(len(sums[0]))]
        for nth, line in enumerate(sums):
            asked = splat(builder, step.load(_I32, *row(nth, at)), _WORDS)
            for place, those in zip(line, columns, strict=True):
                builder.store(_times(builder, builder.load(place), asked, those), place)


@intrinsic
def score_tile(context: Any, query: Any, keys: Any, scores: Any, first: Any, block: Any, column: Any) -> Any:
    """Scores of ``QUERIES`` queries from ``first`` on with a block of 64 rows of K, from ``column`` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        q, k, s = (Array(context, builder, signature.args[at], args[at]) for at in range(3))
        first, block, column = args[3:]
        rows = [builder.add(first, ir.Constant(first.type, nth)) for nth in range(QUERIES)]
        steps = [ir.Constant(first.type, LANES * nth) for nth in range(REGISTERS)]
        sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in steps] for _ in rows]
        for place in itertools.chain(*sums):
            builder.store(_number(0.0), place)
        _add_up(
            builder, sums, k.shape[1], q, lambda nth, at: (rows[nth], at), k, lambda nth, at: (block, at, steps[nth])
        )
        for row, line in zip(rows, sums, strict=True):
            for step, place in zip(steps, line, strict=True):
                s.store(builder.load(place), row, builder.add(column, step))
        return context.get_dummy_value()

    return types.void(query, keys, scores, *[types.intp] * 3), generate


def _value_tile(registers: int) -> Any:
    @intrinsic
    def value_tile(
        context: Any, weights: Any, values: Any, out: Any, fade: Any, first: Any, pair: Any, pairs: Any, column: Any
    ) -> Any:
        """Fade ``out`` ``[Q, Dv]`` from ``column`` on, and add ``pairs`` of rows of V, from ``pair`` on, weighed."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            w, v, o, f = (Array(context, builder, signature.args[at], args[at]) for at in range(4))
            first, pair, pairs, column = args[4:]
            rows = [builder.add(first, ir.Constant(first.type, nth)) for nth in range(QUERIES)]
            columns = [builder.add(column, ir.Constant(first.type, LANES * nth)) for nth in range(registers)]
            sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in columns] for _ in rows]
            for row, line in zip(rows, sums, strict=True):
                fading = splat(builder, f.load(_F32, row), _FLOATS)
                for at, place in zip(columns, line, strict=True):
                    builder.store(builder.fmul(fading, o.load(_FLOATS, row, at)), place)
            _add_up(
                builder, sums, pairs, w, lambda nth, at: (rows[nth], at),
                v, lambda nth, at: (builder.add(pair, at), columns[nth]),
            )  # fmt: skip
            for row, line in zip(rows, sums, strict=True):
                for at, place in zip(columns, line, strict=True):
                    o.store(builder.load(place), row, at)
            return context.get_dummy_value()

        return types.void(weights, values, out, fade, *[types.intp] * 4), generate

    return value_tile


value_one, value_two, value_three, value_four = map(_value_tile, range(1, REGISTERS + 1))


@intrinsic
def largest_of_row(context: Any, scores: Any, row: Any, count: Any) -> Any:
    """The largest of a row's first ``count`` scores, a multiple of 16, or ``-inf``; NaN is passed over."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        s, (row, count) = Array(context, builder, signature.args[0], args[0]), args[1:]
        held = cgutils.alloca_once(builder, _FLOATS)
        builder.store(_number(float("-inf")), held)
        steps = ir.Constant(row.type, 0), count, ir.Constant(row.type, LANES)
        with cgutils.for_range_slice(builder, *steps, row.type) as (at, _):
            builder.store(_larger(builder, s.load(_FLOATS, row, at), builder.load(held)), held)
        return _across(builder, builder.load(held), lambda a, b: _larger(builder, a, b))

    return types.float32(scores, types.intp, types.intp), generate


@intrinsic
def weigh_row(context: Any, scores: Any, weights: Any, row: Any, count: Any, scale: Any, peak: Any) -> Any:
    """Write ``2 ** (scale * score - peak)`` of a row's first ``count`` scores in bf16, and return their sum in fp32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        s, w = (Array(context, builder, signature.args[at], args[at]) for at in range(2))
        row, count = args[2:4]
        scale, less = splat(builder, args[4], _FLOATS), splat(builder, builder.fneg(args[5]), _FLOATS)
        held = cgutils.alloca_once(builder, _FLOATS)
        builder.store(_number(0.0), held)
        steps = ir.Constant(row.type, 0), count, ir.Constant(row.type, LANES)
        with cgutils.for_range_slice(builder, *steps, row.type) as (at, _):
            given = _call(builder, "fma", s.load(_FLOATS, row, at), scale, less)
            some = builder.fcmp_unordered(">", given, _number(_LEAST))  # NaN among them
            exponent = builder.select(some, given, _number(_LEAST))
            whole = _call(builder, "rint", exponent)
            rest = builder.fsub(exponent, whole)
            power = _number(_POWERS[0])
            for factor in _POWERS[1:]:
                power = _call(builder, "fma", power, rest, _number(factor))
            power = builder.select(some, _times_power(builder, power, whole), _number(0.0))
            builder.store(builder.fadd(builder.load(held), power), held)
            w.store(_rounded(builder, power), row, at)
        return _across(builder, builder.load(held), builder.fadd)

    return types.float32(scores, weights, types.intp, types.intp, types.float32, types.float32), generate
