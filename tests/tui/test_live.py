"""From a real chat on the demo model, over its socket, to the screen."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kcache.errors import WatchError
from kcache.watch.attach import LiveSource, attach, find
from kcache_cli.tui.app import Dashboard
from kcache_cli.tui.widgets.heat import HeatPanel

ROOT = Path(__file__).parents[2]
QUESTION = "The password is opal. " * 30 + "What is the password? Say it, then count to one hundred."


@pytest.fixture
def chat(sockets: Path) -> Iterator[LiveSource]:
    """A chat that answers at length, and the source it is watched by."""
    args = ["chat", "smollm2", "--temperature", "0", "-n", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kcache_cli", *args],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(QUESTION)
        process.stdin.close()
        until, source = time.monotonic() + 120, None
        while source is None and time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(WatchError):
                source = attach(find()[0]) if find() else None
            time.sleep(0.05)
        assert source is not None
        yield source
        source.close()
    finally:
        process.kill()
        process.wait()


@pytest.mark.demo
def test_a_real_chat_is_seen_and_its_last_state_stays(chat: LiveSource) -> None:
    async def whole() -> None:
        app = Dashboard(chat)
        async with app.run_test(size=(120, 40)) as pilot:
            seen_picks = False
            until = time.monotonic() + 120
            while chat.live and time.monotonic() < until:
                await pilot.pause(0.05)
                moment = app.moment
                if moment is not None and moment.frame is not None:
                    seen_picks = seen_picks or bool(moment.frame.heat.any())
            await pilot.pause(0.6)
            moment = app.moment
            assert moment is not None and moment.frame is not None
            frame = moment.frame
            assert moment.info.model == "smollm2" and len(frame.layers) == 30
            assert frame.step > 10 and frame.totals.device_bytes > 0
            assert seen_picks  # a short context: what would be picked was asked for
            assert moment.info.policy["dense_below"] == 2048
            panel = app.query_one(HeatPanel)
            panel.cursor = 60
            await pilot.pause()
            from tests.tui.screen import picture

            screen = picture(app)
            assert "the run ended" in screen or "the process ended" in screen
            assert "smollm2" in screen and "opal" in screen

    asyncio.run(whole())
