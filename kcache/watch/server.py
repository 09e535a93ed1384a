"""The doors: an owner-only Unix socket, loopback TCP on request, and the sockets of those who came in."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kcache.errors import WatchError
from kcache.watch.codec import Message
from kcache.watch.places import socket_path
from kcache.watch.viewers import SocketViewer

MOST_VIEWERS = 16
_LOOPBACK = "127.0.0.1"


class Server:
    """Listens, lets viewers in, and waits for whatever happens next; used by one thread, but for :meth:`wake`.

    Parameters
    ----------
    hello : callable
        Makes the answer to a viewer that is let in.
    unix : bool
        Listen on this process's Unix socket.
    port : int, optional
        Also listen on loopback TCP; 0 takes any free port.

    Attributes
    ----------
    path : Path or None
        Of the Unix socket.
    port : int or None
        Of the TCP socket.
    token : str or None
        What a TCP viewer must say.
    viewers : list of SocketViewer

    Raises
    ------
    WatchError
        If it cannot listen.
    """

    def __init__(self, hello: Callable[[], Message], unix: bool = True, port: int | None = None) -> None:
        self.path: Path | None = None
        self.port: int | None = None
        self.token: str | None = None
        self.viewers: list[SocketViewer] = []
        self._hello = hello
        self._selector = selectors.DefaultSelector()
        self._awake, self._bell = socket.socketpair()
        self._doors: list[socket.socket] = []
        for end in (self._awake, self._bell):
            end.setblocking(False)
        self._selector.register(self._awake, selectors.EVENT_READ)
        try:
            if unix:
                self._open_unix()
            if port is not None:
                self._open_tcp(port)
        except BaseException:
            self.close()
            raise

    def _open_unix(self) -> None:
        self.path = socket_path(os.getpid())
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._doors.append(door)
        try:
            door.bind(str(self.path))  # in a folder that nobody else may enter, so there is no moment when others could
            self.path.chmod(0o600)
        except OSError as error:
            raise WatchError(f"cannot publish on {self.path}: {error.strerror or error}") from None
        self._listen(door, None)

    def _open_tcp(self, port: int) -> None:
        door = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._doors.append(door)
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind((_LOOPBACK, port))
        except (OSError, OverflowError) as error:
            raise WatchError(f"cannot listen on port {port}: {getattr(error, 'strerror', None) or error}") from None
        self.port, self.token = door.getsockname()[1], secrets.token_urlsafe(24)
        self._listen(door, self.token)

    def _listen(self, door: socket.socket, token: str | None) -> None:
        door.setblocking(False)
        door.listen(MOST_VIEWERS)
        self._selector.register(door, selectors.EVENT_READ, token or "")

    def wake(self) -> None:
        """End the wait, from any thread; never blocks."""
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody waits
            self._bell.send(b"\0")

    def wait(self, timeout_s: float) -> None:
        """Wait until something happens, and do what the sockets ask for."""
        for viewer in self.viewers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if viewer.waiting else 0)
            self._selector.modify(viewer.connection, events, viewer)
        for key, events in self._selector.select(timeout_s):
            if isinstance(key.data, SocketViewer):
                if events & selectors.EVENT_READ:
                    key.data.read()
                if events & selectors.EVENT_WRITE:
                    key.data.flush()
            elif key.fileobj is self._awake:
                with contextlib.suppress(OSError):
                    self._awake.recv(4096)
            else:
                self._let_in(key.fileobj, key.data)
        for viewer in [viewer for viewer in self.viewers if viewer.is_dead]:
            self._show_out(viewer)

    def _let_in(self, door: Any, token: str) -> None:
        try:
            connection, _ = door.accept()
        except OSError:  # gone before it was let in
            return
        if len(self.viewers) >= MOST_VIEWERS:
            connection.close()
            return
        viewer = SocketViewer(connection, token or None, self._hello)
        self.viewers.append(viewer)
        self._selector.register(connection, selectors.EVENT_READ, viewer)

    def _show_out(self, viewer: SocketViewer) -> None:
        self.viewers.remove(viewer)
        self._selector.unregister(viewer.connection)
        viewer.connection.close()

    def close(self) -> None:
        """Close everything and remove the socket's file."""
        for viewer in list(self.viewers):
            self._show_out(viewer)
        for door in self._doors:
            door.close()
        self._selector.close()
        self._awake.close()
        self._bell.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
