"""Finding processes that publish, and watching one of them over its socket."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kcache.errors import FormatError, WatchError
from kcache.watch.codec import Message
from kcache.watch.columns import read_info, text
from kcache.watch.frame import Info
from kcache.watch.history import History
from kcache.watch.places import sockets
from kcache.watch.wire import Unframer, framed, viewer_hello

_HELLO_S = 5.0
_READ = 1 << 18


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process publishes.

    Attributes
    ----------
    path : Path or None
        A Unix socket.
    host, port, token : str, int, str
        Loopback TCP, where there is no path.
    pid : int or None
        The process, where it is known beforehand.
    """

    path: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    pid: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"{self.host}:{self.port}"


def find() -> list[Place]:
    """The processes that publish now, the one that began last first; sockets of dead ones are removed."""
    found = []
    for pid, path in sockets():
        try:
            with _connected(Place(path)):
                found.append(Place(path, pid=pid))
        except ConnectionRefusedError:  # nobody holds it any more
            path.unlink(missing_ok=True)
        except OSError:  # gone meanwhile, or too busy to answer
            continue
    return found


def attach(place: Place) -> LiveSource:
    """Begin to watch a process.

    Raises
    ------
    WatchError
        If nobody is there, or the process refuses, with the reason.
    """
    try:
        connection = _connected(place)
    except OSError as error:
        raise WatchError(f"cannot reach {place}: {error.strerror or error}") from None
    try:
        unframer = Unframer()
        info, early = _greet(connection, unframer, place.token)
    except (OSError, FormatError) as error:
        connection.close()
        raise WatchError(f"{place} does not answer as kcache does: {error}") from None
    except BaseException:
        connection.close()
        raise
    return LiveSource(connection, unframer, info, early)


def _connected(place: Place) -> socket.socket:
    if place.path is None:
        return socket.create_connection((place.host, place.port), _HELLO_S)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_HELLO_S)
        connection.connect(str(place.path))
    except BaseException:
        connection.close()
        raise
    return connection


def _greet(connection: socket.socket, unframer: Unframer, token: str | None) -> tuple[Info, list[Message]]:
    """Say hello; returns who it is, and what else came with the answer."""
    connection.sendall(framed(viewer_hello(token)))
    messages: list[Message] = []
    while not messages:
        data = connection.recv(_READ)
        if not data:
            raise WatchError("the process closed the connection; it may have as many viewers as it takes")
        messages += unframer.feed(data)
    answer, *early = messages
    if answer.get("kind") == "refused":
        raise WatchError(f"refused: {text(answer, 'reason')}")
    info = answer.get("info")
    if answer.get("kind") != "hello" or not isinstance(info, dict):
        raise FormatError("no hello")
    return read_info(info), early


class LiveSource(History):
    """Frames of another process; see :class:`~kcache.watch.source.Source`. Made by :func:`attach`."""

    def __init__(self, connection: socket.socket, unframer: Unframer, info: Info, early: list[Message]) -> None:
        super().__init__()
        self.info = info
        self._connection, self._unframer = connection, unframer
        self._arrived = threading.Condition()
        connection.settimeout(None)
        self._thread = threading.Thread(target=self._read, args=(early,), name="kcache-attach", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is a frame or there will be none; whether there is."""
        with self._arrived:
            self._arrived.wait_for(lambda: self.latest() is not None or not self.live, timeout_s)
        return self.latest() is not None

    def ask(self, *, rate_hz: float | None = None, picks: bool | None = None, probe: bool | None = None) -> None:
        """See :class:`~kcache.watch.source.Source`."""
        with contextlib.suppress(OSError):  # the reader will say that the process is gone
            self._connection.sendall(framed({"kind": "ask", "rate_hz": rate_hz, "picks": picks, "probe": probe}))

    def close(self) -> None:
        """See :class:`~kcache.watch.source.Source`."""
        self.end("closed")
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def _read(self, early: list[Message]) -> None:
        try:
            self._take(early)
            while data := self._connection.recv(_READ):
                self._take(self._unframer.feed(data))
            self.end("the process ended")
        except OSError as error:
            self.end(f"connection lost: {error.strerror or error}")
        except FormatError as error:
            self.end(f"the process sent what is no frame: {error}")
        with self._arrived:
            self._arrived.notify_all()

    def _take(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.take(message)
            with self._arrived:
                self._arrived.notify_all()
