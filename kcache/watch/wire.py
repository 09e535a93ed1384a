"""How a publisher and its viewers talk: messages with their length before them, and who says hello how.

The viewer speaks first (``viewer``: protocol version, and the token over TCP), the publisher answers ``hello`` with
its :class:`~kcache.watch.frame.Info`, or ``refused`` with the reason. Then come ``frame``, ``text``, ``info`` when
there is more to say than at first, and at last ``end``; a viewer may send ``ask`` at any time. A message is 4 bytes of
length, big-endian, and msgpack (:mod:`kcache.watch.codec`).
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator

from kcache.errors import FormatError
from kcache.watch.codec import LARGEST_MESSAGE, Message, pack, unpack

VERSION = 1
MAGIC = "kcache-watch"
LARGEST_REQUEST = 4096
"""Bytes of the largest message a viewer may send."""

_LENGTH = struct.Struct(">I")


def framed(message: Message | bytes) -> bytes:
    """A message, or one that is packed already, with its length before it."""
    body = message if isinstance(message, bytes) else pack(message)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Takes bytes as they come and gives whole messages.

    Parameters
    ----------
    largest : int
        Bytes of the largest message that is believed.
    """

    def __init__(self, largest: int = LARGEST_MESSAGE) -> None:
        self._largest = largest
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are whole now.

        Raises
        ------
        FormatError
            If one is malformed or too long.
        """
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > self._largest:
                raise FormatError(f"a message of {length:,} bytes is announced; at most {self._largest:,} are allowed")
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield unpack(body)


def viewer_hello(token: str | None = None) -> Message:
    """What a viewer says first."""
    return {"kind": "viewer", "magic": MAGIC, "version": VERSION, "token": token}


def refusal(message: Message, token: str | None) -> str | None:
    """Why a viewer that began with ``message`` is refused; None when it is welcome."""
    if message.get("kind") != "viewer" or message.get("magic") != MAGIC:
        return "that is not a kcache viewer"
    if message.get("version") != VERSION:
        return f"the viewer speaks version {message.get('version')!r:.20}, this process {VERSION}; use the same kcache"
    given = message.get("token")
    if token is not None and not (isinstance(given, str) and hmac.compare_digest(given.encode(), token.encode())):
        return "the token is wrong or missing"
    return None
