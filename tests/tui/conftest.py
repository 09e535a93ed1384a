"""A dashboard on a fake source and a fake clock, driven by a pilot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from kcache_cli.tui.app import Dashboard
from tests.tui.fakes import FakeClock, FakeSource, conversation
from tests.tui.screen import words


class Driver:
    """A running dashboard."""

    def __init__(self, app: Dashboard, pilot: Pilot[None], clock: FakeClock, source: FakeSource) -> None:
        self.app, self.pilot, self.clock, self.source = app, pilot, clock, source

    async def settle(self) -> None:
        """Wait until the reader and the screen have nothing to do."""
        while True:
            while not self.clock.settled:
                await asyncio.sleep(0.002)
            await self.pilot.pause()
            if self.clock.settled:
                return

    async def tick(self, seconds: float = 0.2) -> None:
        """Let time pass."""
        self.clock.advance(seconds)
        await self.settle()

    async def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            await self.pilot.press(key)
            await self.settle()

    def text(self) -> str:
        """What is on the screen."""
        return words(self.app)


@asynccontextmanager
async def running(
    source: FakeSource | None = None, size: tuple[int, int] = (120, 40), **options: Any
) -> AsyncIterator[Driver]:
    """Run a dashboard."""
    source = source or FakeSource(conversation())
    clock = FakeClock()
    app = Dashboard(source, clock=clock, **options)
    async with app.run_test(size=size, notifications=True) as pilot:
        driver = Driver(app, pilot, clock, source)
        for _ in range(3):  # the first layout, what it lays out, and what that draws
            await driver.settle()
        yield driver


def drive(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an asynchronous test."""
    asyncio.run(test())


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NO_COLOR", "KCACHE_THEME", "KCACHE_ASCII", "KCACHE_KEYS", "TEXTUAL_THEME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")
    monkeypatch.chdir(tmp_path)
