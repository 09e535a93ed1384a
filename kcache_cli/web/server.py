"""The web server, textual-serve's, made safe: loopback alone, and only for who knows the address it printed.

Whatever runs on this machine, and any page in the user's browser, can reach a loopback port. So a random token is part
of the address; it becomes a cookie that other sites cannot send, and requests that name another host (a name bound to
127.0.0.1 by somebody else) or come from another page are refused. Each window gets a process of its own, started by a
fixed command.
"""

from __future__ import annotations

import hmac
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from textual_serve.server import Server

from kcache.errors import InputError
from kcache_cli.web.order import Order

HOST = "127.0.0.1"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self' ws://{host}; frame-ancestors 'none'; form-action 'none'"
)
"""The page is textual-serve's; whatever it names elsewhere, a font, is not fetched."""
_FAREWELL_S = 0.5
"""How long windows that are open may keep the server when it ends; by itself it waits until each has been closed."""


class WebServer(Server):
    """Serves dashboards.

    Parameters
    ----------
    port : int
        The one it listens on.

    Attributes
    ----------
    token : str
        What the first request must bring.
    """

    def __init__(self, port: int) -> None:
        command = shlex.join([sys.executable, "-m", "kcache_cli.web"])
        if os.name == "posix":
            command = f"exec {command}"  # else a shell stands between us, and a window would not see us go
        super().__init__(command, host=HOST, port=port, title="kcache")
        self.token = secrets.token_urlsafe(24)
        self.cookie = f"kcache-{port}"  # a browser shares cookies among ports

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"{self.public_url}/?token={self.token}"

    async def on_startup(self, app: web.Application) -> None:
        """Print nothing: the command says where it is."""

    async def make_app(self) -> web.Application:
        """The application behind its guard."""
        app = await self._make_app()
        app.middlewares.append(self._guard())
        return app

    def _guard(self) -> Middleware:
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not self._is_from_here(request):
                raise web.HTTPForbidden(text="this server answers its own pages only")
            if self._knows(request.cookies.get(self.cookie)):
                response = await handler(request)
                if not response.prepared:
                    response.headers["Referrer-Policy"] = "no-referrer"
                    response.headers["Content-Security-Policy"] = POLICY.format(host=request.host)
                return response
            if request.path == "/" and self._knows(request.query.get("token")):
                found = web.HTTPFound("/")
                found.set_cookie(self.cookie, self.token, httponly=True, samesite="Strict")
                raise found
            raise web.HTTPForbidden(text="open the address that kcache inspect --web printed")

        return guard

    def _is_from_here(self, request: web.Request) -> bool:
        hosts = {f"{name}:{self.port}" for name in (HOST, "localhost")}
        origin = request.headers.get("Origin")
        return request.host in hosts and (origin is None or urlsplit(origin).netloc == request.host)

    def _knows(self, said: str | None) -> bool:
        return said is not None and hmac.compare_digest(said.encode(), self.token.encode())


def serve(order: Order, port: int, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Parameters
    ----------
    order : Order
        What each window shows.
    port : int
        Of loopback; 0 for any that is free.
    announce : callable
        Told the address once the server listens.

    Raises
    ------
    InputError
        If the port is taken.
    """
    try:
        door = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: {getattr(error, 'strerror', None) or error}; give another") from None
    order.put()
    server = WebServer(door.getsockname()[1])
    announce(server.address)
    web.run_app(server.make_app(), sock=door, print=None, access_log=None, shutdown_timeout=_FAREWELL_S)
