"""One dashboard for one browser window: started by :mod:`kcache_cli.web.server`, speaks to it through its pipes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from textual.app import App, ComposeResult
from textual.widgets import Static

from kcache.errors import KCacheError
from kcache_cli.exits import describe
from kcache_cli.inspect.choose import choose
from kcache_cli.tui.start import dashboard
from kcache_cli.web.order import Order

_LOOK_S = 1.0


class Sorry(App[None]):
    """Says why there is no dashboard."""

    CSS = "Screen { align: center middle; } Static { width: auto; max-width: 80%; }"

    def __init__(self, reason: str) -> None:
        super().__init__()
        self._reason = reason

    def compose(self) -> ComposeResult:
        """One line."""
        yield Static(f"{self._reason}\n\nReload the page to try again.", markup=False)


def end_without(parent: int) -> None:
    """End this process, which has nothing to lose, soon after its parent has gone: no window will be closed then."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the dashboard until the window is closed, or the server has gone without a word."""
    threading.Thread(target=end_without, args=(os.getppid(),), daemon=True).start()
    order = Order.take()
    try:
        source = choose(None if order.file is None else Path(order.file), order.pid, order.address)
    except KCacheError as error:
        Sorry(describe(error)).run()
        return
    with contextlib.closing(source):
        dashboard(source).run()


if __name__ == "__main__":
    main()
