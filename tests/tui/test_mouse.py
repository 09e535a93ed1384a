"""The mouse: reading cells, choosing modes, zooming, sorting, seeking."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from textual.events import MouseDown, MouseMove, MouseScrollDown, MouseScrollUp, MouseUp
from textual.geometry import Offset

from kcache_cli.tui.model.heat import Mode, Window
from kcache_cli.tui.screens.detail import DetailScreen
from kcache_cli.tui.widgets.bars import Timeline
from kcache_cli.tui.widgets.heat import HeatPanel
from kcache_cli.tui.widgets.layers import LayersPanel
from tests.tui.conftest import Driver, running
from tests.tui.fakes import FakeSource, conversation


def run(body: Callable[[Driver], Awaitable[None]], source: FakeSource | None = None, **options: Any) -> None:
    async def whole() -> None:
        async with running(source, **options) as driver:
            await body(driver)

    asyncio.run(whole())


def test_hover_reads_a_cell_and_a_click_chooses_a_mode() -> None:
    async def body(driver: Driver) -> None:
        panel = driver.app.query_one(HeatPanel)
        await driver.pilot.hover(HeatPanel, offset=Offset(40, 9))  # frame, modes, seven lines
        await driver.settle()
        assert panel.at_layer == 14 and panel.cursor is not None
        await driver.pilot.click(HeatPanel, offset=Offset(18, 1))
        await driver.settle()
        assert panel.mode is Mode.HISTORY

    run(body)


def test_a_double_click_opens_the_layer() -> None:
    async def body(driver: Driver) -> None:
        await driver.pilot.click(HeatPanel, offset=Offset(40, 9), times=2)
        await driver.settle()
        assert isinstance(driver.app.screen, DetailScreen) and driver.app.screen.at_layer == 14

    run(body)


def test_a_drag_zooms_and_the_wheel_too() -> None:
    async def body(driver: Driver) -> None:
        panel = driver.app.query_one(HeatPanel)
        await driver.pilot._post_mouse_events([MouseDown], HeatPanel, offset=Offset(40, 9), button=1)
        await driver.pilot._post_mouse_events([MouseMove], HeatPanel, offset=Offset(60, 9), button=1)
        await driver.pilot._post_mouse_events([MouseUp], HeatPanel, offset=Offset(60, 9), button=1)
        await driver.settle()
        start, end = panel.window.within(6008)
        assert 1100 < end - start < 1300
        await driver.pilot._post_mouse_events([MouseScrollUp], HeatPanel, offset=Offset(50, 9))
        await driver.settle()
        assert panel.window.within(6008)[1] - panel.window.within(6008)[0] < 700
        for _ in range(4):
            await driver.pilot._post_mouse_events([MouseScrollDown], HeatPanel, offset=Offset(50, 9))
        await driver.settle()
        assert panel.window == Window()

    run(body)


def test_the_table_is_sorted_and_a_row_is_chosen() -> None:
    async def body(driver: Driver) -> None:
        panel = driver.app.query_one(LayersPanel)
        await driver.pilot.click(LayersPanel, offset=Offset(12, 1))
        await driver.settle()
        assert (panel.sort, panel.backwards) == ("attn", False)
        await driver.pilot.click(LayersPanel, offset=Offset(12, 1))
        await driver.settle()
        assert panel.backwards
        await driver.pilot.click(LayersPanel, offset=Offset(12, 3))
        await driver.settle()
        assert panel.at_layer == 3  # the second of those with the least mass

    run(body)


def test_the_timeline_is_sought() -> None:
    async def body(driver: Driver) -> None:
        width = driver.app.query_one(Timeline).size.width
        await driver.pilot.click(Timeline, offset=Offset(width // 2, 0))
        await driver.settle()
        moment = driver.app.moment
        assert moment is not None and 4 <= moment.place.index <= 6

    run(body, FakeSource(conversation(), live=False))
