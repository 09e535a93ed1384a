"""What Numba has no word for: bf16 in registers, a fast exponential, raw addresses, calls to OpenMP.

A row of bf16 is read as 32-bit words. The value at an odd place is the word with its low half cleared, the one at an
even place the word shifted up: one instruction each, for a whole vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

_FAST = {"nnan", "nsz", "arcp", "contract", "afn", "reassoc"}
"""Sums may be reordered and there are no NaN; infinities are used, so ``ninf`` is not among them."""
intrinsic: Any = _intrinsic
_I32, _F32 = ir.IntType(32), ir.FloatType()
_LEAST = np.float32(-87.0)
_LOG2E = np.float32(1.4426950408889634)
_HALF = np.float32(0.5)
_ZERO = np.float32(0.0)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled code calls: no way in from Python, which halves the time it takes."""
    decorate: Any = njit
    return decorate(fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


@intrinsic
def even_half(context: Any, word: Any) -> Any:
    """The bf16 at the even place of a 32-bit word, as fp32."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(args[0], ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint32), generate


@intrinsic
def odd_half(context: Any, word: Any) -> Any:
    """The bf16 at the odd place of a 32-bit word, as fp32."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(args[0], ir.Constant(_I32, 0xFFFF0000)), _F32)

    return types.float32(types.uint32), generate


@intrinsic
def widened(context: Any, bits: Any) -> Any:
    """One bf16 as fp32."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint16), generate


@intrinsic
def power_of_two(context: Any, exponent: Any) -> Any:
    """2 to a whole fp32 exponent between -126 and 127, made of its bits."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = builder.add(builder.fptosi(args[0], _I32), ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(whole, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.float32), generate


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def call_number(context: Any, address: Any) -> Any:
    """Call the C function ``int f(void)`` at an address."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.inttoptr(args[0], ir.FunctionType(_I32, []).as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def call_void(context: Any, address: Any) -> Any:
    """Call the C function ``void f(void)`` at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@kernel
def exponential(x: Any) -> Any:
    """``exp(x)`` for ``x <= 0`` in fp32, 0 below -87, to a relative 2e-7: a polynomial that vectorises."""
    at_least = x if x > _LEAST else _LEAST
    y = at_least * _LOG2E
    whole = np.floor(y + _HALF)
    rest = y - whole
    result = np.float32(1.5403530393381608e-4)
    result = result * rest + np.float32(1.3333558146428443e-3)
    result = result * rest + np.float32(9.618129107628477e-3)
    result = result * rest + np.float32(5.5504108664821576e-2)
    result = result * rest + np.float32(2.402265069591007e-1)
    result = result * rest + np.float32(6.931471805599453e-1)
    result = result * rest + np.float32(1.0)
    return result * power_of_two(whole) if x > _LEAST else _ZERO
