"""How commands open the dashboard: settings, terminals, the menu of processes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from kcache.errors import InputError
from kcache.watch.attach import Place
from kcache_cli.tui.menu import Candidate, Menu
from kcache_cli.tui.start import NO_TERMINAL, check_terminal, dashboard, parse_keys, pick
from kcache_cli.tui.widgets.panel import Panel
from tests.cli.conftest import Run, run
from tests.cli.fakes import FakeEngine
from tests.tui.fakes import INFO, FakeSource, conversation
from tests.tui.screen import check

__all__ = ["run"]


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sockets: Path) -> Path:
    monkeypatch.setenv("KCACHE_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    return tmp_path / "config.toml"


def test_settings_reach_the_dashboard(settings_file: Path) -> None:
    settings_file.write_text('theme = "nord"\nascii = true\nkeys = "pause=o, quit=x"\n')
    app = dashboard(FakeSource(conversation()))
    assert app.theme == "nord" and app.look.ascii
    settings_file.write_text('theme = "plaid"\n')
    with pytest.raises(InputError, match=r"'plaid'.*kcache-dark"):
        dashboard(FakeSource(conversation()))


def test_what_was_typed_while_a_job_was_loaded_are_no_keys_of_the_dashboard(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = ["q"]
    monkeypatch.setattr("kcache_cli.tui.start.typed_ahead", lambda stream: waiting.pop())

    async def opened() -> None:
        async with dashboard(FakeSource(conversation()), lambda: True).run_test():
            assert not waiting

    asyncio.run(opened())


def test_what_comes_while_the_dashboard_closes_is_too_late(settings_file: Path) -> None:
    async def closed() -> None:
        app = dashboard(FakeSource(conversation()))
        async with app.run_test() as pilot:
            while app.moment is None:
                await pilot.pause(0.01)
            app._running = False  # which is first, and the panels are next
            await app.query(Panel).remove()
            app.show_words()  # which may have been asked for before, after the next refresh
            app.feed._waiting = replace(app.moment)
            app.post_message(app.Arrived())
            app.post_message(app.Ended(None))
            await pilot.pause()

    asyncio.run(closed())


def test_other_keys() -> None:
    assert parse_keys(None) == {}
    assert parse_keys("pause=o, quit=x ctrl+q") == {"pause": "o", "quit": "x,ctrl+q"}
    for wrong in ("pauze=o", "pause", "pause="):
        with pytest.raises(InputError, match="NAME=KEY"):
            parse_keys(wrong)


def test_without_a_terminal_there_is_no_dashboard(settings_file: Path, run: Run) -> None:
    with pytest.raises(InputError):
        check_terminal()
    for command in ("chat", "generate"):
        engine = FakeEngine()
        result = run(command, "--dashboard", input="hi", engine=engine)
        assert result.exit_code == 2 and "leave it away" in result.stderr
        assert "load" not in engine.calls


def test_a_recording_needs_a_terminal_too(settings_file: Path, run: Run, tmp_path: Path) -> None:
    from dataclasses import asdict

    from kcache.watch.recorder import Recorder

    recorder = Recorder(tmp_path / "run.kcr")
    recorder.begin(asdict(INFO))
    recorder.close("the run ended")
    result = run("inspect", str(tmp_path / "run.kcr"))
    assert result.exit_code == 2 and NO_TERMINAL in result.stderr


def test_with_one_process_that_answers_there_is_nothing_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [Place(pid=11), Place(pid=22)]
    answering = [Candidate(places[1], replace(INFO, pid=22))]
    monkeypatch.setattr("kcache.watch.attach.find", lambda: places)
    monkeypatch.setattr("kcache_cli.tui.menu.candidates", lambda places: answering)
    assert pick() == 22
    answering.clear()
    assert pick() is None


def test_the_menu(request: pytest.FixtureRequest) -> None:
    now = INFO.started_s + 600
    found = [
        Candidate(Place(pid=pid), replace(INFO, pid=pid, command=command, model=model))
        for pid, command, model in ((11, "chat", "smollm2"), (22, "bench", "org/a-model-with-a-rather-long-name-8B"))
    ]

    async def choose(*keys: str) -> Candidate | None:
        app = Menu(found, now)
        async with app.run_test(size=(100, 20)) as pilot:
            await pilot.pause()
            if not keys:
                check(app, "menu", request.config)
            await pilot.press(*keys)
            await pilot.pause()
        return app.return_value

    assert asyncio.run(choose()) is None
    chosen = asyncio.run(choose("down", "enter"))
    assert chosen is not None and chosen.place.pid == 22
    assert asyncio.run(choose("escape")) is None
