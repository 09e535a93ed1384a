"""Every screen, compared with a committed picture of it; ``--renew-screens`` makes them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from kcache_cli.tui.widgets.heat import HeatPanel
from tests.tui.conftest import running
from tests.tui.fakes import FakeSource, conversation, frame, two_turns
from tests.tui.screen import check

WIDE, SMALL = (120, 40), (80, 24)


@dataclass
class Case:
    name: str
    frames: Any = conversation
    size: tuple[int, int] = WIDE
    keys: tuple[str, ...] = ()
    cursor: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    live: bool = True
    ended: str | None = None
    no_color: bool = False


LIGHT = {"theme": "kcache-light"}
NEEDLE = (14, 3305)
CASES = [
    Case("wide-dark", cursor=NEEDLE),
    Case("wide-light", cursor=NEEDLE, options=LIGHT),
    Case("wide-no-color", cursor=NEEDLE, no_color=True),
    Case("small-dark", size=SMALL),
    Case("small-light", size=SMALL, options=LIGHT),
    Case("small-no-color", size=SMALL, no_color=True),
    Case("small-ascii", size=SMALL, options={"ascii": True}),
    Case("small-layers", size=SMALL, keys=("4", "s")),
    Case("small-text", size=SMALL, keys=("6",)),
    Case("small-speed", size=SMALL, keys=("5",)),
    Case("wide-history", keys=("v",)),
    Case("wide-heads", cursor=NEEDLE, keys=("v", "v", "z")),
    Case("wide-age", keys=("v", "v", "v")),
    Case("wide-maximised", keys=("4", "m")),
    Case("wide-detail", cursor=NEEDLE, keys=("enter",)),
    Case("small-detail", size=SMALL, cursor=NEEDLE, keys=("enter",)),
    Case("wide-help", keys=("question_mark",)),
    Case("small-help", size=SMALL, keys=("question_mark",)),
    Case("wide-replay", frames=two_turns, live=False, keys=("t", "t")),
    Case("small-replay", frames=two_turns, size=SMALL, live=False, keys=("end",)),
    Case("wide-batch", frames=lambda: conversation(9, batch=4)),
    Case("small-batch", frames=lambda: conversation(9, batch=4), size=SMALL, keys=("6",)),
    Case("wide-dense", frames=lambda: conversation(9, prompt=900, mode="dense")),
    Case("small-prefill", frames=lambda: [frame(0, phase="prefill", prompt=2048)], size=SMALL),
    Case("small-ended", size=SMALL, ended="the process ended"),
    Case("small-waiting", frames=list, size=SMALL),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_screen(case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.no_color:
        monkeypatch.setenv("NO_COLOR", "1")

    async def look() -> None:
        source = FakeSource(case.frames(), live=case.live)
        async with running(source, case.size, **case.options) as driver:
            if case.ended is not None:
                source.end(case.ended)
                await driver.tick()
            if case.cursor is not None:
                heat = driver.app.query_one(HeatPanel)
                heat.at_layer, heat.cursor = case.cursor
                await driver.settle()
            await driver.press(*case.keys)
            await driver.settle()
            check(driver.app, case.name, request.config)

    asyncio.run(look())
