"""Every key, on a fake source and a fake clock."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from kcache_cli.tui.app import Dashboard
from kcache_cli.tui.feed import USUAL_HZ
from kcache_cli.tui.keys import KEYS
from kcache_cli.tui.layout import PANELS
from kcache_cli.tui.model.heat import Mode, Window
from kcache_cli.tui.screens.detail import DetailScreen
from kcache_cli.tui.screens.help import HelpScreen
from kcache_cli.tui.widgets.heat import HeatPanel
from kcache_cli.tui.widgets.layers import LayersPanel
from tests.tui.conftest import Driver, running
from tests.tui.fakes import FakeSource, conversation, frame, two_turns

Body = Callable[[Driver], Awaitable[None]]


def run(body: Body, source: FakeSource | None = None, **options: Any) -> None:
    async def whole() -> None:
        async with running(source, **options) as driver:
            await body(driver)

    asyncio.run(whole())


def heat(driver: Driver) -> HeatPanel:
    return driver.app.query_one(HeatPanel)


def layers(driver: Driver) -> LayersPanel:
    return driver.app.query_one(LayersPanel)


def step(driver: Driver) -> int:
    moment = driver.app.moment
    assert moment is not None and moment.frame is not None
    return moment.frame.step


def test_the_cursor_reads_a_cell() -> None:
    async def body(driver: Driver) -> None:
        panel = heat(driver)
        panel.at_layer, panel.cursor = 15, 3305
        await driver.settle()
        where = r"layer 15 tiered · tokens 3,\d+–3,\d+ · \d+ picks, \d+ % of the layer's · "
        assert re.search(where + r"attention \d+ % of \d+ % in all", driver.text())
        assert "blue lighthouse" in driver.text()
        await driver.press("v", "v")
        assert re.search(
            r"layer 15 head 0 tiered · .* picks, \d+ % of the head's · attention \d+ % of 9\d % in all", driver.text()
        )

    run(body)

    async def narrow(driver: Driver) -> None:
        panel = heat(driver)
        panel.at_layer, panel.cursor = 15, 3305
        await driver.settle()
        assert re.search(r"layer 15 · tokens 3,2\d\d–3,3\d\d · ~\d+ picks, \d+ % · attn ~\d+ % of \d+ %", driver.text())

    run(narrow, FakeSource(conversation(picks=False)), size=(80, 24))

    async def unknown(driver: Driver) -> None:
        panel = heat(driver)
        panel.at_layer, panel.cursor = 15, 3305
        await driver.settle()
        assert "attention - of 90 % in all" in driver.text()

    bare = [
        replace(it, layers=tuple(replace(layer, held=None) for layer in it.layers)) for it in conversation(picks=False)
    ]
    run(unknown, FakeSource(bare))


def test_an_empty_cache_leaves_its_layers_their_room() -> None:
    async def body(driver: Driver) -> None:
        before = heat(driver).size
        driver.source.add(frame(1))
        await driver.tick()
        assert heat(driver).size == before

    run(body, FakeSource([frame(0, layers=0)]), size=(200, 60))


def test_quit() -> None:
    async def body(driver: Driver) -> None:
        await driver.pilot.press("q")
        await driver.pilot.pause()
        assert not driver.app.is_running

    run(body)


def test_leave_from_anywhere() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("slash")
        await driver.pilot.press("ctrl+d")
        await driver.pilot.pause()
        assert not driver.app.is_running

    run(body)


def test_help_opens_and_closes() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("question_mark")
        assert isinstance(driver.app.screen, HelpScreen)
        assert "stop here, and go on" in driver.text()
        await driver.press("question_mark")
        assert not isinstance(driver.app.screen, HelpScreen)

    run(body)


def test_pause_holds_a_live_view_and_going_on_jumps_to_the_newest() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("space")
        assert "paused" in driver.text()
        driver.source.add(frame(9), frame(10))
        await driver.tick()
        assert step(driver) == 8
        await driver.press("space")
        assert step(driver) == 10
        assert "live" in driver.text()

    run(body)


def test_arrows_step_through_time_when_paused_and_move_the_cursor_otherwise() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("left")
        assert step(driver) == 8 and heat(driver).cursor is not None
        assert heat(driver).at_layer == 2  # the first that picks
        await driver.press("space", "left", "left")
        assert step(driver) == 6
        await driver.press("right")
        assert step(driver) == 7
        await driver.press("home")
        assert step(driver) == 0
        await driver.press("end")
        assert step(driver) == 8

    run(body)


def test_rate_of_a_live_view() -> None:
    async def body(driver: Driver) -> None:
        before = len(driver.source.asked)
        await driver.press("plus")
        assert driver.app.feed.rate_hz == 2 * USUAL_HZ
        assert driver.source.asked[before:] == [{"rate_hz": 2 * USUAL_HZ}]
        assert "10 Hz" in driver.text()
        await driver.press("minus", "minus")
        assert driver.app.feed.rate_hz < USUAL_HZ
        await driver.press(*["minus"] * 8)
        assert driver.app.feed.rate_hz == 1

    run(body)


def test_a_replay_plays_at_its_pace_and_speed() -> None:
    async def body(driver: Driver) -> None:
        assert step(driver) == 0
        await driver.tick(0.25)
        assert step(driver) == 2
        await driver.press("plus")  # twice as fast
        await driver.tick(0.2)
        assert step(driver) == 6
        await driver.press("space")
        await driver.tick(5)
        assert step(driver) == 6
        await driver.press("space")
        await driver.tick(5)
        assert step(driver) == 8 and "paused" in driver.text()
        await driver.press("space")  # from its end it begins anew
        assert step(driver) == 0

    run(body, FakeSource(conversation(), live=False))


def test_turns() -> None:
    async def body(driver: Driver) -> None:
        moment = driver.app.moment
        assert moment is not None and moment.place.turns == (0, 1, 6, 7)
        seen = []
        for key in ("t", "t", "t", "T"):
            await driver.press(key)
            moment = driver.app.moment
            assert moment is not None
            seen.append(moment.place.index)
        assert seen == [1, 6, 7, 6]

    run(body, FakeSource(two_turns(), live=False))


def test_panels_and_maximise() -> None:
    async def body(driver: Driver) -> None:
        for key, name in enumerate(PANELS, 1):
            await driver.press(str(key))
            assert driver.app.focused is not None and driver.app.focused.id == name
            await driver.press("m")
            assert [each for each in PANELS if _is_shown(driver.app, each)] == [name]
            await driver.press("m")
            assert all(_is_shown(driver.app, each) for each in PANELS)

    run(body)


def _is_shown(app: Dashboard, name: str) -> bool:
    return app.query_one(f"#{name}").region.area > 0


def test_a_small_terminal_shows_the_panel_that_was_asked_for() -> None:
    async def body(driver: Driver) -> None:
        assert _is_shown(driver.app, "heat") and not _is_shown(driver.app, "layers")
        await driver.press("4")
        assert _is_shown(driver.app, "layers") and not _is_shown(driver.app, "heat")
        await driver.press("3")
        assert _is_shown(driver.app, "heat")
        await driver.press("4")
        await driver.pilot.resize_terminal(120, 40)
        await driver.settle()
        assert _is_shown(driver.app, "layers") and _is_shown(driver.app, "heat")

    run(body, size=(80, 24))


def test_modes() -> None:
    async def body(driver: Driver) -> None:
        seen = []
        for _ in range(4):
            await driver.press("v")
            seen.append(heat(driver).mode)
        assert seen == [Mode.HISTORY, Mode.HEADS, Mode.AGE, Mode.LAST]
        await driver.press("V")
        assert heat(driver).mode is Mode.AGE

    run(body)


def test_heads_shows_a_layer_that_picks_and_goes_on_to_the_next() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("v", "v")
        assert heat(driver).at_layer == 2  # the first two attend exactly
        await driver.press("down", "down", "down", "down")
        assert (heat(driver).at_layer, heat(driver).head) == (3, 0)
        await driver.press("up")
        assert (heat(driver).at_layer, heat(driver).head) == (2, 2)

    run(body)


def test_cursor_and_zoom() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("down", "down", "a", "a")
        panel = heat(driver)
        assert panel.at_layer == 3 and panel.cursor is not None
        assert "layer 3 tiered" in driver.text()
        assert layers(driver).at_layer == 3
        await driver.press("z", "z")
        start, end = panel.window.within(6008)
        assert end - start == 1502 and start <= panel.cursor < end
        await driver.press("x")
        assert panel.window.within(6008)[1] - panel.window.within(6008)[0] == 3004
        await driver.press("backspace")
        assert panel.window == Window() and panel.cursor is not None
        await driver.press("backspace")
        assert panel.cursor is None

    run(body)


def test_the_cursor_reads_the_text() -> None:
    async def body(driver: Driver) -> None:
        panel = heat(driver)
        panel.at_layer, panel.cursor = 14, 3305
        await driver.settle()
        text = driver.text()
        assert "The secret code of the blue lighthouse is 7413" in text  # under the map
        assert text.count("The secret code of the blue") == 2
        assert "6 text from token" in text

    run(body)


def test_the_text_is_that_of_the_cells_after_a_step_in_time() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("space", "a", "left", "left")
        positions = heat(driver).positions()
        assert positions is not None
        text = driver.text()
        assert f"tokens {positions.start:,}–{positions.stop - 1:,}" in text
        found = re.search(r"6 text from token ([\d,]+)", text)
        assert found and int(found[1].replace(",", "")) in range(positions.start - 8, positions.stop)

    run(body, FakeSource([frame(step, prompt=6000 + 70 * step) for step in range(1, 5)]))


def test_enter_opens_a_layer_and_arrows_go_to_its_neighbours() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("down", "down", "enter")
        screen = driver.app.screen
        assert isinstance(screen, DetailScreen)
        assert "error bound" in driver.text() and "layer 3" in driver.text()
        await driver.press("down")
        assert screen.at_layer == 4
        driver.source.add(frame(9))
        await driver.tick()
        assert screen.moment is driver.app.moment
        await driver.press("escape")
        assert not isinstance(driver.app.screen, DetailScreen)

    run(body)


def test_sort_and_reverse() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("s")
        moment = driver.app.moment
        assert moment is not None
        rows = [row.layer for row in layers(driver).rows(moment)]
        assert rows[:2] == [29, 28] and set(rows[-2:]) == {0, 1}  # no attn is last
        await driver.press("S")
        assert [row.layer for row in layers(driver).rows(moment)][:2] == [2, 3]
        await driver.press(*["s"] * 7)
        assert layers(driver).sort == "layer"

    run(body)


def test_filter() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("slash")
        assert isinstance(driver.app.focused, Input)
        await driver.press(*"attn>.9", "enter")
        moment = driver.app.moment
        assert moment is not None and layers(driver).filter == "attn>.9"
        shown = layers(driver).rows(moment)
        assert 0 < len(shown) < 20 and all(row.attn is not None and row.attn > 0.9 for row in shown)
        await driver.press("slash", *"x", "enter")
        assert "no such" in driver.text()  # it says so, and what was there stays
        assert layers(driver).filter == "attn>.9"
        await driver.press("escape")
        assert layers(driver).filter == ""
        assert driver.app.focused is layers(driver)

    run(body)


def test_layers_are_chosen_in_the_table_as_well() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("4", "down", "down", "pagedown")
        assert layers(driver).at_layer == heat(driver).at_layer == 12
        await driver.press("up", "enter")
        assert isinstance(driver.app.screen, DetailScreen)

    run(body)


def test_export(tmp_path: Any) -> None:
    async def body(driver: Driver) -> None:
        driver.app.folder = tmp_path
        await driver.press("e", "e")
        assert [path.name for path in sorted(tmp_path.glob("*.svg"))] == ["kcache-1.svg", "kcache-2.svg"]
        assert "<svg" in (tmp_path / "kcache-1.svg").read_text()
        driver.app.folder = tmp_path / "nowhere" / "\0"
        driver.app.folder = tmp_path / "kcache-1.svg"
        await driver.press("e")
        assert "kcache-1.svg" in driver.text()

    run(body)


def test_probe() -> None:
    async def body(driver: Driver) -> None:
        assert {"probe": True} not in driver.source.asked
        await driver.press("p")
        driver.source.add(frame(9))
        await driver.tick()
        assert driver.source.asked[-1] == {"probe": True}
        await driver.press("p")
        driver.source.add(frame(10))
        await driver.tick()
        assert driver.source.asked[-1] == {"probe": False}

    run(body)


def test_a_replay_cannot_be_asked_what_would_be_picked() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("p")
        assert "of a live run alone" in driver.text()

    run(body, FakeSource(conversation(), live=False))


def test_zoom_is_for_all_panels() -> None:
    async def body(driver: Driver) -> None:
        heat = driver.app.query_one(HeatPanel)
        for panel in ("4", "3", "5"):
            await driver.press(panel, "z")
            assert heat.window.end is not None
            await driver.press("backspace")
            assert heat.window.end is None

    run(body)


def test_short_contexts_are_asked_what_they_would_pick() -> None:
    async def body(driver: Driver) -> None:
        assert {"probe": True} in driver.source.asked
        driver.source.add(frame(30))
        await driver.tick()
        assert driver.source.asked[-1] == {"probe": False}

    run(body, FakeSource(conversation(4, prompt=100, mode="dense")))


def test_escape_closes_step_by_step() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("2", "m", "question_mark", "escape")
        assert not isinstance(driver.app.screen, HelpScreen)
        assert driver.app.maximised == "link"
        await driver.press("escape")
        assert driver.app.maximised is None

    run(body)


def test_ctrl_c_without_work_leaves_it_alone() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("ctrl+c")
        assert driver.app.is_running and "nothing to stop; q leaves" in driver.text()

    run(body)


def test_ctrl_c_stops_the_work() -> None:
    stopped: list[bool] = []

    def stop() -> bool:
        stopped.append(True)
        return True

    async def body(driver: Driver) -> None:
        await driver.press("ctrl+c")
        assert stopped == [True] and driver.app.is_running

    run(body, stop=stop)


@pytest.mark.parametrize(
    ("failed", "said"), [(None, "done"), (KeyboardInterrupt(), "stopped"), (RuntimeError("no"), "failed")]
)
@pytest.mark.parametrize("size", [(120, 40), (80, 24)])
def test_a_job_that_is_over_is_no_longer_live(failed: BaseException | None, said: str, size: tuple[int, int]) -> None:
    async def body(driver: Driver) -> None:
        assert "live" in driver.text()
        driver.app.work_ended(failed)
        await driver.settle()
        assert f"{said}; q leaves" in driver.text() and "live" not in driver.text()

    run(body, size=size)


def test_sequences_are_called_by_their_names() -> None:
    source = FakeSource(conversation(9, batch=4))
    source.called = (
        "short",
        "a-name-that-is-much-longer-than-there-is-room",
        "\x1b[31m[red]x[/red]",
        "日本語日本語日本語日本語",
    )

    async def body(driver: Driver) -> None:
        lines = [line for line in driver.text().splitlines() if "go" not in line]
        text = "\n".join(lines)
        assert " short " in text and "a-name-that" in text and "longer-than" not in text
        assert "[31m[red]x" in text and "\x1b" not in text and "日本語" in text
        bars = [line for line in lines if "short" in line or "a-name" in line]
        assert len({line.rstrip().rstrip("│ ").rfind(" ") for line in bars}) == 1, "figures stand below each other"

    run(body, source=source)


def test_names_stay_apart_in_two_columns() -> None:
    source = FakeSource(conversation(9, batch=16))
    source.called = tuple(f"poem-{number}-of-many-lines" for number in range(10, 26))

    async def body(driver: Driver) -> None:
        assert "poem-10-" in driver.text() and "poem-11-" in driver.text()

    run(body, source=source)


def test_sequences_of_which_nothing_is_known_yet() -> None:
    source = FakeSource([replace(frame(1, batch=4), sequences=())])
    source.called = ("a", "b", "c", "d")

    async def body(driver: Driver) -> None:
        assert "0 of 4 going" in driver.text()

    run(body, source=source)


def test_the_command_palette_has_every_key() -> None:
    async def body(driver: Driver) -> None:
        found = {command.title: command.help for command in driver.app.get_system_commands(driver.app.screen)}
        for key in KEYS:
            assert found[key.short.capitalize()] == key.long
        await driver.press("ctrl+p", *"maximum"[:3], "enter")
        assert driver.app.maximised is not None

    run(body)


def test_keys_can_be_given_others() -> None:
    async def body(driver: Driver) -> None:
        await driver.press("space")
        assert "paused" not in driver.text()
        await driver.press("o")
        assert "paused" in driver.text()
        await driver.press("question_mark")
        assert "  o  stop here, and go on" in driver.text()

    run(body, keymap={"pause": "o"})


def test_ids_of_keys_are_unique_and_no_key_is_taken_twice() -> None:
    assert len({key.id for key in KEYS}) == len(KEYS)
    keys = [each for key in KEYS for each in key.keys.split(",")]
    assert len(set(keys)) == len(keys)


def test_the_docs_name_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dashboard.md").read_text()
    names = page.split("Names of keys: `")[1].split("`")[0].split()
    assert names == [key.id for key in KEYS]
