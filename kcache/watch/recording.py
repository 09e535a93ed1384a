"""Reading a recording: a :class:`~kcache.watch.source.Source` over a ``.kcr`` file, whole, cut or damaged.

Opening checks the frame of every record and remembers where frames are; their content is read when asked for. What is
damaged is named and left out, and with it the frames that depend on it, up to the next that stands alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from kcache.errors import FormatError, InputError
from kcache.watch.codec import LARGEST_MESSAGE, Message
from kcache.watch.columns import read_frame, read_info
from kcache.watch.frame import Frame, Info
from kcache.watch.kcr import DELTA, END, HEAD, HEADER, KEY, MAGIC, START, TEXT, VERSION, open_record, thicken
from kcache.watch.transcript import Transcript


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a frame is: its record's number, the payload's offset and length, the text records before it."""

    record: int
    offset: int
    length: int
    alone: bool
    texts: int


class Recording:
    """Frames of a file; see :class:`~kcache.watch.source.Source`.

    Parameters
    ----------
    path : path

    Raises
    ------
    InputError
        If the file cannot be read, is no recording, or holds not even a header.
    """

    live = False

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        self._closed: str | None = None
        self._frames: list[_Place] = []
        self._texts: list[Message] = []
        self._info: Info | None = None
        self._latest: tuple[int, Message] | None = None
        self._transcript, self._told = Transcript(), 0
        self._check_start()
        self._scan()
        if self._info is None:
            raise FormatError(f"{path}: {self._closed or 'holds no header'}")

    def _check_start(self) -> None:
        if len(self._data) < START.size or not self._data.startswith(MAGIC):
            raise FormatError(f"{self.path}: not a recording of kcache")
        _, version = START.unpack_from(self._data)
        if version != VERSION:
            raise FormatError(f"{self.path}: is of version {version}, this kcache reads {VERSION}")

    def _scan(self) -> None:
        """Go from record to record."""
        at, number, follows, ended = START.size, 0, False, False
        while at < len(self._data):
            number += 1
            start = at + HEAD.size
            length, checksum = HEAD.unpack_from(self._data, at) if start <= len(self._data) else (0, 0)
            if not 0 < length <= LARGEST_MESSAGE or start + length > len(self._data):
                self._say(f"record {number} at byte {at} is cut short")
                return
            payload = self._data[start : start + length]
            if zlib.crc32(payload) != checksum:
                self._say(f"record {number} at byte {at} is damaged")
                follows = False
            elif payload[:1] in (KEY, DELTA):
                follows = follows or payload[:1] == KEY
                if follows:
                    alone = payload[:1] == KEY
                    self._frames.append(_Place(number, start, length, alone, len(self._texts)))
            else:
                ended = self._take(payload, number, at) or ended
            at = start + length
        if not ended:
            self._say(f"the recording has no end: the process stopped after record {number}")

    def _take(self, payload: bytes, number: int, at: int) -> bool:
        """Take in a record that is no frame; returns whether it is the end."""
        try:
            message = open_record(payload)
            if payload[:1] == HEADER and self._info is None:
                self._info = read_info(message)
            elif payload[:1] == TEXT:
                self._texts.append(message)
        except FormatError as error:
            self._say(f"record {number} at byte {at}: {error}")
        return payload[:1] == END

    def _say(self, problem: str) -> None:
        """Keep the first problem."""
        self._closed = self._closed or problem

    @property
    def info(self) -> Info:
        """See :class:`~kcache.watch.source.Source`."""
        assert self._info is not None
        return self._info

    @property
    def closed(self) -> str | None:
        """See :class:`~kcache.watch.source.Source`; what is wrong with the file."""
        return self._closed

    def span(self) -> range:
        """See :class:`~kcache.watch.source.Source`; becomes shorter when a frame turns out to be unreadable."""
        return range(len(self._frames))

    def frame(self, index: int) -> Frame:
        """See :class:`~kcache.watch.source.Source`."""
        if not 0 <= index < len(self._frames):
            raise IndexError(f"the recording has {len(self._frames)} frames, not frame {index}")
        try:
            return read_frame(self._columns(index))
        except FormatError as error:
            place = self._frames[index]
            self._say(f"record {place.record} at byte {place.offset - HEAD.size}: {error}")
            del self._frames[index:]
            raise IndexError(f"frame {index} is unreadable: {error}") from None

    def _columns(self, index: int) -> Message:
        """The columns of a frame, from the last one that stands alone or was read before."""
        first = index
        while not self._frames[first].alone and (self._latest is None or self._latest[0] != first):
            first -= 1
        columns: Message = {}
        for at in range(first, index + 1):
            if self._latest is not None and self._latest[0] == at:
                columns = self._latest[1]
                continue
            place = self._frames[at]
            message = open_record(self._data[place.offset : place.offset + place.length])
            columns = message if place.alone else thicken(message, columns)
        self._latest = index, columns
        return columns

    def latest(self) -> Frame | None:
        """See :class:`~kcache.watch.source.Source`: the last frame that can be read."""
        while self._frames:
            try:
                return self.frame(len(self._frames) - 1)
            except IndexError:  # that frame is gone now, try the one before
                continue
        return None

    def pieces(self, start: int, end: int, sequence: int = 0, index: int | None = None) -> list[str]:
        """See :class:`~kcache.watch.source.Source`."""
        nothing = [""] * max(0, end - start)
        if not self._frames:
            return nothing
        frame = self.frame(len(self._frames) - 1 if index is None else index)
        text = self._text_at(len(self._frames) - 1 if index is None else index)
        return (text.pieces(frame.run, start, min(end, frame.tokens), sequence) + nothing)[: len(nothing)]

    def names(self, index: int | None = None) -> tuple[str, ...]:
        """See :class:`~kcache.watch.source.Source`."""
        if not self._frames:
            return ()
        at = len(self._frames) - 1 if index is None else index
        run = self.frame(at).run
        return self._text_at(at).names(run)

    def _text_at(self, index: int) -> Transcript:
        """The text as it was at a frame."""
        texts = self._frames[index].texts
        if texts < self._told:
            self._transcript, self._told = Transcript(), 0
        for message in self._texts[self._told : texts]:
            try:
                self._transcript.apply(message)
            except FormatError as error:
                self._say(f"text: {error}")
        self._told = texts
        return self._transcript

    def ask(self, *, rate_hz: float | None = None, picks: bool | None = None, probe: bool | None = None) -> None:
        """See :class:`~kcache.watch.source.Source`: nobody is there to ask."""

    def close(self) -> None:
        """See :class:`~kcache.watch.source.Source`."""


def open_recording(path: Path) -> Recording:
    """Open a recording; see :class:`Recording`."""
    return Recording(path)
