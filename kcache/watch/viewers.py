"""Who is served: viewers behind a socket, and the viewer in this process.

A viewer is given the next thing only when it has taken the one before: the newest frame if one is due, else text it
does not have yet. So nothing piles up for a slow one, it misses frames, and a dead one is found out by its silence.
"""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from kcache.errors import FormatError
from kcache.watch.codec import Message, pack
from kcache.watch.columns import PICKS, real
from kcache.watch.history import History
from kcache.watch.tokens import Tokens
from kcache.watch.transcript import TextCursor
from kcache.watch.wire import LARGEST_REQUEST, Unframer, framed, refusal

PATIENCE_S = 10.0
"""How long a viewer may take nothing of what it was sent, or say no hello, before it is dropped."""
SLOWEST_HZ, USUAL_HZ, FASTEST_HZ = 0.2, 10.0, 60.0
_READ = 65_536


class Board:
    """What viewers are shown: the latest frame, packed at most once each way, and the text.

    ``info`` is who publishes, once there is more to say than at the beginning.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.info: Message | None = None
        self.frame: Message | None = None
        self._packed: dict[bool, bytes] = {}

    def show(self, frame: Message) -> None:
        """Put up a newer frame."""
        self.frame, self._packed = frame, {}

    @property
    def number(self) -> int:
        """Of the latest frame; 0 before the first."""
        return 0 if self.frame is None else int(self.frame["number"])

    def packed(self, picks: bool) -> bytes:
        """The latest frame as bytes, with or without exact picks."""
        assert self.frame is not None
        if picks not in self._packed:
            left_out = () if picks else PICKS
            self._packed[picks] = pack({name: value for name, value in self.frame.items() if name not in left_out})
        return self._packed[picks]


class Viewer(ABC):
    """One viewer: what it asked for, and how far it has been served."""

    def __init__(self) -> None:
        self.rate_hz = USUAL_HZ
        self.picks = True
        self.probe = False
        self.text = TextCursor()
        self._seen = 0
        self._next_s = 0.0
        self._told: Message | None = None

    def ask(self, message: Message) -> None:
        """Take in what the viewer asks for.

        Raises
        ------
        FormatError
            If that makes no sense.
        """
        if message.get("rate_hz") is not None:
            self.rate_hz = min(FASTEST_HZ, max(SLOWEST_HZ, real(message, "rate_hz")))
        for name in ("picks", "probe"):
            if message.get(name) is not None:
                if not isinstance(message[name], bool):
                    raise FormatError(f"{name}: true or false was expected")
                setattr(self, name, message[name])

    def serve(self, board: Board, at_once: bool = False) -> None:
        """Give the viewer what it can take now; a frame when it is due, or ``at_once``."""
        while self.ready:
            now = time.monotonic()
            if board.info is not None and board.info is not self._told:
                self._told = board.info
                self.give({"kind": "info", "info": board.info})
                continue
            if board.number > self._seen and (at_once or now >= self._next_s):
                self._seen = board.number
                self._next_s = now + 0.9 / self.rate_hz  # frames come at that rate already, give or take
                self.give_frame(board)
                continue
            text = self.text.next(board.tokens)
            if text is None:
                return
            self.give(text)

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it takes the next thing."""

    @abstractmethod
    def give_frame(self, board: Board) -> None:
        """Give it the latest frame."""

    @abstractmethod
    def give(self, message: Message) -> None:
        """Give it a message."""


class LocalViewer(Viewer):
    """The viewer in this process: its history is filled directly."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self.history = history

    @property
    def ready(self) -> bool:
        """See :class:`Viewer`."""
        return self.history.live

    def give_frame(self, board: Board) -> None:
        """See :class:`Viewer`."""
        assert board.frame is not None
        self.history.take(board.frame)

    def give(self, message: Message) -> None:
        """See :class:`Viewer`."""
        self.history.take(message)


class SocketViewer(Viewer):
    """A viewer behind a socket that never blocks.

    Parameters
    ----------
    connection : socket
    token : str or None
        What it must say to be let in.
    hello : callable
        Makes the answer to a viewer that is let in.
    """

    def __init__(self, connection: socket.socket, token: str | None, hello: Callable[[], Message]) -> None:
        super().__init__()
        connection.setblocking(False)
        self.connection = connection
        self.greeted = False
        self.gone = False
        self._token, self._hello = token, hello
        self._in = Unframer(LARGEST_REQUEST)
        self._out = memoryview(b"")
        self._leaving = False
        self._moved_s = time.monotonic()

    @property
    def ready(self) -> bool:
        """See :class:`Viewer`."""
        return self.greeted and not self.waiting and not self.gone

    @property
    def waiting(self) -> bool:
        """Whether bytes wait to be sent."""
        return bool(len(self._out))

    @property
    def is_dead(self) -> bool:
        """Whether it has kept us waiting for too long."""
        stalled = self.waiting or not self.greeted
        return self.gone or (stalled and time.monotonic() - self._moved_s > PATIENCE_S)

    def give_frame(self, board: Board) -> None:
        """See :class:`Viewer`."""
        self._send(board.packed(self.picks))

    def give(self, message: Message) -> None:
        """See :class:`Viewer`."""
        self._send(message)

    def _send(self, message: Message | bytes) -> None:
        self._out = memoryview(framed(message))
        self._moved_s = time.monotonic()
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self.waiting:
                sent = self.connection.send(self._out)
                self._out = self._out[sent:]
                self._moved_s = time.monotonic()
        except BlockingIOError:
            return
        except OSError:
            self.gone = True
        self.gone = self.gone or self._leaving

    def read(self) -> None:
        """Take in what the viewer says; one that talks nonsense is gone."""
        try:
            data = self.connection.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.gone = True
            return
        try:
            for message in self._in.feed(data):
                self._answer(message)
        except FormatError:
            self.gone = True

    def _answer(self, message: Message) -> None:
        if self.greeted:
            if message.get("kind") == "ask":
                self.ask(message)
            return
        reason = refusal(message, self._token)
        if reason is None:
            self.greeted = True
            self._send(self._hello())
        else:
            self._leaving = True
            self._send({"kind": "refused", "reason": reason})
