"""The format of recordings, ``.kcr``: what a record is, and a frame as its difference from the one before.

A file is :data:`MAGIC`, a version, and records: length and CRC-32 of the payload (4 bytes each, little-endian), then
the payload: a letter for its kind and a message (:mod:`kcache.watch.codec`), deflated. Kinds: ``H`` the header with
the publisher's Info, first and once; ``K`` a frame that stands alone, ``D`` one that is added to the frame before;
``T`` text; ``E`` the end, missing if the process died.

Arrays named in a frame's ``delta`` are differences; what is missing, but for exact picks and what buckets hold, is as
in the frame before. A frame stands alone at least every :data:`KEY_EVERY` frames, so that a reader can begin there. A
reader passes over columns that it does not know, and does without those that an older writer did not: the version
stays.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from kcache.errors import FormatError
from kcache.watch.codec import LARGEST_MESSAGE, Message, pack, unpack
from kcache.watch.columns import SOMETIMES

MAGIC = b"\x89KCR\r\n\x1a\n"
VERSION = 1
START = struct.Struct("<8sH")
HEAD = struct.Struct("<II")
HEADER, KEY, DELTA, TEXT, END = b"H", b"K", b"D", b"T", b"E"
KEY_EVERY = 64

_DIFFERED = ("counts", "histogram", "overlap", "heads", "mass")
_WRAPPED = ("overlap", "mass")
_LEVEL = 6
# What messages have in common; deflate refers to it, so a name costs next to nothing. Part of the format.
_WORDS = (
    b"environment context_length started_s weights_bytes host_only link_gb_s policy parts reason "
    b"sequences observed batch job kinds modes memory marks shapes picks speed phase run number time tokens "
    b"kind frame delta counts histogram overlap heads mass"
)


def record(kind: bytes, message: Message) -> bytes:
    """A message as a record."""
    deflate = zlib.compressobj(_LEVEL, wbits=-15, zdict=_WORDS)
    payload = kind + deflate.compress(pack(message)) + deflate.flush()
    return HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def open_record(payload: bytes) -> Message:
    """The message of a payload whose checksum was right.

    Raises
    ------
    FormatError
        If it is not one.
    """
    inflate = zlib.decompressobj(-15, zdict=_WORDS)
    try:
        data = inflate.decompress(payload[1:], LARGEST_MESSAGE)
    except zlib.error as error:
        raise FormatError(f"not deflated data: {error}") from None
    if not inflate.eof or inflate.unused_data:
        raise FormatError("not one deflated message")
    return unpack(data)


def thin(frame: Message, before: Message) -> Message:
    """A frame's message as what is new in it since the frame ``before``."""
    thinned: Message = {}
    delta = []
    for name, value in frame.items():
        if isinstance(value, np.ndarray):
            old = before.get(name)
            if name in _DIFFERED and isinstance(old, np.ndarray) and old.shape == value.shape:
                if np.array_equal(old, value):
                    continue
                delta.append(name)
                value = _difference(name, value, old)
            thinned[name] = value
        elif name not in before or before[name] != value:
            thinned[name] = value
    return {**thinned, "delta": delta}


def thicken(thinned: Message, before: Message) -> Message:
    """The inverse of :func:`thin`.

    Raises
    ------
    FormatError
        If what was thinned does not fit the frame before.
    """
    delta = thinned.get("delta", [])
    if not isinstance(delta, list):
        raise FormatError("delta: a list was expected")
    frame = {name: value for name, value in before.items() if name not in SOMETIMES}
    frame |= {name: value for name, value in thinned.items() if name != "delta"}
    for name in delta:
        if not isinstance(name, str):
            raise FormatError("delta: names were expected")
        new, old = frame.get(name), before.get(name)
        if not isinstance(new, np.ndarray) or not isinstance(old, np.ndarray) or new.shape != old.shape:
            raise FormatError(f"delta: {name:.40} does not fit the frame before")
        if new.dtype.kind not in "iu" or old.dtype.kind not in "iu":
            raise FormatError(f"{name}: whole numbers were expected")
        total = old.astype(np.int64) + new.astype(np.int64)
        frame[name] = (total & 0xFF).astype(np.uint8) if name in _WRAPPED else total
    return frame


def _difference(name: str, value: np.ndarray, old: np.ndarray) -> np.ndarray:
    difference: np.ndarray = value.astype(np.int64) - old.astype(np.int64)
    return (difference & 0xFF).astype(np.uint8) if name in _WRAPPED else difference
