"""Messages as bytes: msgpack with numpy arrays, sizes bounded, nothing trusted.

An array is an extension of its dtype, its shape and its little-endian values; whole numbers take the fewest bytes that
hold them. Unpacking makes plain values and arrays only, and refuses whatever is malformed or too large with
:class:`~kcache.errors.FormatError`.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import numpy as np

from kcache.errors import FormatError

LARGEST_MESSAGE = 32 * 2**20
"""Bytes; neither a socket nor a recording may announce more."""

_ARRAY = 1
_DTYPES = [np.dtype(name) for name in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8", "<f4", "<f8")]
_WHOLE = [np.dtype(name) for name in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8")]
_MOST_DIMENSIONS = 4

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """Turn plain values and arrays into bytes."""
    packed: bytes = msgpack.packb(message, default=_pack_array)
    return packed


def unpack(data: bytes) -> Message:
    """Turn bytes back into a message.

    Raises
    ------
    FormatError
        If they are not one.
    """
    try:
        message = msgpack.unpackb(data, ext_hook=_unpack_array, raw=False, strict_map_key=True)
    except FormatError:
        raise
    except Exception as error:  # msgpack raises many kinds, on purpose and not
        raise FormatError(f"not a message: {type(error).__name__} {error}".strip()) from None
    if not isinstance(message, dict):
        raise FormatError(f"not a message: a map was expected, got {type(message).__name__}")
    return message


def shrink(array: np.ndarray) -> np.ndarray:
    """The same whole numbers in the smallest type that holds them."""
    if not array.size or array.dtype.itemsize == 1:
        return array
    least, most = int(array.min()), int(array.max())
    for dtype in _WHOLE:
        limits = np.iinfo(dtype)
        if limits.min <= least and most <= limits.max:
            return array.astype(dtype)
    return array


def _pack_array(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a message cannot hold {type(value).__name__}")
    small = shrink(value) if value.dtype.kind in "iu" else value
    code = _DTYPES.index(small.dtype)
    head = struct.pack(f"<BB{small.ndim}I", code, small.ndim, *small.shape)
    return msgpack.ExtType(_ARRAY, head + np.ascontiguousarray(small).tobytes())


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != _ARRAY or len(data) < 2 or data[0] >= len(_DTYPES) or data[1] > _MOST_DIMENSIONS:
        raise FormatError("not a message: it holds a value of an unknown kind")
    dtype, dimensions = _DTYPES[data[0]], data[1]
    head = 2 + 4 * dimensions
    if len(data) < head:
        raise FormatError("not a message: an array is cut short")
    shape = struct.unpack_from(f"<{dimensions}I", data, 2)
    if len(data) - head != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"not a message: an array of {len(data) - head} bytes says its shape is {shape}")
    return np.frombuffer(data, dtype, offset=head).reshape(shape)
