"""What the kernels share: matrix products in full precision, the launch context, splitting work over the device.

Scores are kept in units of log2, so that a probability is one ``exp2``. Row numbers in the kernels (``row``) count
(sequence, selection head) pairs: a selection head is a KV head with its G query heads, or, with picks made per query
head, one query head alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kcache.backends.rounding import LOWER_STEPS

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)
LOWER = tl.constexpr(LOWER_STEPS)
_OTHER_SHARED_BYTES = 12 * 1024
"""What a program needs beside its tiles, about."""
_LEAST_TILES = 4
"""A piece has at least so many tiles, so that its pipeline fills."""
_MOST_SPLITS = 128
"""Partial results are reduced in one program."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` at import time)."""
    return not isinstance(dot, triton.runtime.JITFunction)


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make ``device`` the current one: Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Chip:
    """What kernels are planned for; an H100 where nothing says otherwise.

    Attributes
    ----------
    multiprocessors : int
    shared_bytes : int
        Shared memory that one program may take.
    cached_bytes : int
        Size of the L2 cache.
    capability : int
        Compute capability, 90 for 9.0.
    """

    multiprocessors: int = 132
    shared_bytes: int = 227 * 1024
    cached_bytes: int = 50 * 2**20
    capability: int = 90

    def tiles_held(self, stages: int) -> int:
        """Tiles in shared memory when ``stages`` of them are in flight or being multiplied.

        The products of data-centre cards from Hopper on read shared memory while the next tiles arrive there; other
        cards have copied a tile to registers by then.
        """
        return stages if 90 <= self.capability < 120 else stages - 1

    def resident(self, most: int, tile_bytes: int) -> int:
        """Programs per multiprocessor, with ``tile_bytes`` each in shared memory; 0 where not even one fits."""
        return min(most, self.shared_bytes // (tile_bytes + _OTHER_SHARED_BYTES))


def chip_of(device: torch.device) -> Chip:
    """What ``device`` is; two multiprocessors for the interpreter, so that splitting is exercised."""
    if device.type != "cuda":
        return Chip(multiprocessors=2)
    properties = torch.cuda.get_device_properties(device)
    return Chip(
        properties.multi_processor_count,
        int(getattr(properties, "shared_memory_per_block_optin", Chip.shared_bytes)),
        int(getattr(properties, "L2_cache_size", Chip.cached_bytes)),
        10 * properties.major + properties.minor,
    )


def power_of_two(number: int) -> int:
    """The least power of two that is at least ``number`` (and at least 1)."""
    return 1 << max(0, number - 1).bit_length()


def choose_splits(rows: int, tiles: int, slots: int) -> int:
    """Pieces to cut each of ``rows`` rows of work into, so that the programs fill whole waves of ``slots``.

    Parameters
    ----------
    rows : int
        Independent rows of work.
    tiles : int
        Tiles a row is made of.
    slots : int
        Programs the device runs at a time.
    """
    best, best_fill = 1, 0.0
    for splits in range(1, max(1, min(_MOST_SPLITS, tiles // _LEAST_TILES)) + 1):
        waves = -(-rows * splits // slots)
        longest = -(-tiles // splits)
        fill = rows * tiles / (waves * slots * longest)
        if fill > best_fill * 1.02:
            best, best_fill = splits, fill
    return best


def cut(rows: int, tiles: int, programs: int, least_tiles: int) -> int:
    """Pieces to cut each of ``rows`` rows of work into for about so many ``programs`` of at least ``least_tiles``."""
    splits = max(1, min(-(-programs // rows), tiles // least_tiles, _MOST_SPLITS))
    return -(-tiles // -(-tiles // splits))


def reduction_step(width: int, parts: int) -> int:
    """Partial sums of ``width`` numbers to load at once: few round trips, without spilling."""
    return min(power_of_two(parts), max(1, 8192 // width))


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """``a @ b`` in fp32. The interpreter has no bf16 product, hence ``UPCAST``; fp32 never uses tf32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def weighted_rows(weights, rows, UPCAST: tl.constexpr):
    """``weights @ rows`` for fp32 weights in [-1, 1] and rows of any type, as exact as fp32.

    The rows go to the tensor cores as they are; the weights are cut into terms of the rows' type: three of bf16's
    8 bits, or two of fp16's 11 (scaled up, because fp16 has no small exponents).
    """
    if UPCAST or rows.dtype == tl.float32:
        result = tl.dot(weights, rows.to(tl.float32), input_precision="ieee")
    elif rows.dtype == tl.float16:
        scaled = weights * 16384.0
        high = scaled.to(tl.float16)
        low = (scaled - high.to(tl.float32)).to(tl.float16)
        result = (tl.dot(high, rows) + tl.dot(low, rows)) * (1.0 / 16384.0)
    else:
        high = weights.to(rows.dtype)
        rest = weights - high.to(tl.float32)
        middle = rest.to(rows.dtype)
        low = (rest - middle.to(tl.float32)).to(rows.dtype)
        result = tl.dot(low, rows)
        result = tl.dot(middle, rows, result)
        result = tl.dot(high, rows, result)
    return result


@triton.jit
def whole_rows(rows, dtype: tl.constexpr):
    """Whole numbers as floats. By way of fp32, since the interpreter takes the bits of an int8 for those of a bf16."""
    return rows.to(tl.float32).to(dtype)


@triton.jit
def largest_size(values, axis: tl.constexpr):
    """The largest absolute value; NaN where one is not finite, which a maximum on a device passes over."""
    return tl.max(tl.abs(values), axis) + tl.sum(values * 0.0, axis)


@triton.jit
def in_steps(wide, scale):
    """The whole numbers of steps of ``scale`` nearest to numbers, and what is left, in 254ths of a step."""
    steps = wide / tl.where(scale > 0.0, scale, 1.0)
    nearest = (steps + 12582912.0) - 12582912.0  # the nearest whole number, an even one in the middle
    return nearest, ((steps - nearest) * LOWER + 12582912.0) - 12582912.0
