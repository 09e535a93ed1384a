"""The regions as machine code: what threads enter, for each type of rows, compiled by Numba and kept on disk."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from numba.np.numpy_support import carray

from kcache.backends.jit.prompt import FIELDS as PROMPT_FIELDS
from kcache.backends.jit.prompt import prompt
from kcache.backends.jit.regions import FIELDS, decode, dense

_FIELDS, _OF_PROMPT = len(FIELDS), len(PROMPT_FIELDS)


def _entries(sources: int) -> dict[tuple[str, torch.dtype], Callable[[Any], None]]:
    """The functions that threads enter. ``sources`` tells versions of this package apart in Numba's cache on disk.

    That cache watches the file of the function it compiles and none of those it calls.
    """

    def decode_bf16(data: Any) -> None:
        if sources != 0:
            decode(carray(data, (_FIELDS,), np.int64), np.uint32, np.uint16)

    def decode_fp32(data: Any) -> None:
        if sources != 0:
            decode(carray(data, (_FIELDS,), np.int64), np.float32, np.float32)

    def dense_bf16(data: Any) -> None:
        if sources != 0:
            dense(carray(data, (_FIELDS,), np.int64), np.uint32)

    def dense_fp32(data: Any) -> None:
        if sources != 0:
            dense(carray(data, (_FIELDS,), np.int64), np.float32)

    def prompt_bf16(data: Any) -> None:
        if sources != 0:
            prompt(carray(data, (_OF_PROMPT,), np.int64))

    return {
        ("prompt", torch.bfloat16): prompt_bf16,
        ("decode", torch.bfloat16): decode_bf16,
        ("decode", torch.float32): decode_fp32,
        ("dense", torch.bfloat16): dense_bf16,
        ("dense", torch.float32): dense_fp32,
    }


@lru_cache
def compiled(name: str, dtype: torch.dtype) -> int:
    """Address of a region by its name. Compiled on first use, which takes seconds; kept on disk."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    sources = 1 + zlib.crc32(b"".join(path.read_bytes() for path in files))
    entry, signature = _entries(sources)[name, dtype], types.void(types.voidptr)
    try:
        region: Any = cfunc(signature, cache=True)(entry)
    except RuntimeError:  # no folder that can be written to
        region = cfunc(signature)(entry)
    return int(region.address)
