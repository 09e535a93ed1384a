"""Chat and generate with the dashboard: the engine in a thread, the screen never waits for it."""

from __future__ import annotations

import _thread
import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from prompt_toolkit.history import History
from textual.events import Key, MouseScrollUp, Paste
from textual.geometry import Offset
from textual.widgets import Input

from kcache.policy import Policy
from kcache_cli.chat.conversation import Conversation
from kcache_cli.chat.prompt import open_history
from kcache_cli.ending import Ended, heard
from kcache_cli.tui.app import Dashboard
from kcache_cli.tui.beside import Beside
from kcache_cli.tui.conversation import Conversing
from kcache_cli.tui.widgets.words import WordsPanel
from tests.cli.fakes import FakeModel, FakeSession, event
from tests.tui.conftest import Driver, running
from tests.tui.fakes import FakeSource, conversation
from tests.tui.screen import check


def hold(session: FakeSession, at: int) -> tuple[threading.Event, threading.Event]:
    """Hang the engine before token number ``at``; returns what says so, and what lets it go on."""
    reached, go = threading.Event(), threading.Event()

    def wait(number: int) -> None:
        if number == at:
            reached.set()
            go.wait(20)

    session.before_token = wait
    return reached, go


def chat(
    *answers: list[str], document: str | None = None, history: History | None = None
) -> tuple[Conversing, FakeSession]:
    session = FakeSession(FakeModel(), Policy(), answers or [["Hello", " there", "."]])
    told = Conversation(cast(Any, session), "fake", 100, True, document, quiet=True)
    return Conversing(told, history), session


async def until(driver: Driver, condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        await driver.pilot.pause()
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


async def write(driver: Driver, text: str) -> None:
    """Put text into the input, and send it."""
    driver.app.query_one("#say", Input).value = text
    await driver.press("enter")


async def write_two(driver: Driver, reached: threading.Event) -> None:
    """Ask, and ask again while the engine hangs in the first answer."""
    await write(driver, "first")
    await until(driver, reached.is_set)
    await write(driver, "second")


def said(driver: Driver) -> str:
    text = driver.app.query_one(WordsPanel).said
    return "" if text is None else text.plain


def test_a_question_is_answered_on_the_screen() -> None:
    talk, session = chat()

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await driver.press(*"hi", "enter")
            await until(driver, lambda: "tok/s" in said(driver).split("Hello there.")[-1])
            assert "▶ hi\nHello there.\nprompt 1" in said(driver)
            assert "Hello there." in driver.text()
            assert session.messages[0]["content"] == "hi"
            await write(driver, "/set max_tokens 7")
            await until(driver, lambda: "max_tokens = 7" in said(driver))
            assert talk.conversation.max_tokens == 7
            await write(driver, "/help")
            await until(driver, lambda: "/system" in said(driver) and "goes to the panels, where" in said(driver))
            assert '"""' not in said(driver)
            await write(driver, "/nonsense")
            await until(driver, lambda: "no command /nonsense" in said(driver))

    asyncio.run(whole())


def test_what_was_typed_before_there_was_an_input_is_kept() -> None:
    talk, session = chat(["One."], ["Two."])

    async def whole() -> None:
        source = FakeSource(conversation())
        async with running(source, talk=talk, typed=lambda: "first\n\nsecond\nbegun q") as driver:
            await until(driver, lambda: "Two." in said(driver))
            assert [message["content"] for message in session.messages] == ["first", "One.", "second", "Two."]
            await driver.press("escape", "i", "exclamation_mark")  # coming back to it does not replace it
            assert driver.app.query_one("#say", Input).value == "begun q!"

    asyncio.run(whole())


def test_what_was_written_before_comes_back(tmp_path: Path) -> None:
    (tmp_path / "history").write_text('\n# then\n+hello\n\n# later\n+"""two\n+  lines\x1b"""\n')
    history = open_history(tmp_path / "history")

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=chat(history=history)[0]) as driver:
            say = driver.app.query_one("#say", Input)

            async def press(*keys: str) -> str:
                await driver.press(*keys)
                return say.value

            assert await press("up") == "two lines"
            assert await press("up") == await press("up") == "hello"
            assert await press("down", "down") == await press("down") == ""
            await write(driver, "how?")
            await write(driver, "how?")
            assert await press("h", "up") == "how?" and await press("up") == "hello"  # those that begin like it
            assert await press("down", "down") == "h"
            assert await press("up", "exclamation_mark", "up") == "how?!"

    asyncio.run(whole())
    assert (tmp_path / "history").read_text().count("+how?") == 1


def test_all_lines_that_are_pasted_are_written() -> None:
    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=chat()[0]) as driver:
            say = driver.app.query_one("#say", Input)
            say.post_message(Paste("one\n\n  two\r\nthree\n"))
            await driver.settle()
            assert say.value == "one two three"

    asyncio.run(whole())


def test_letters_that_are_kept_apart_are_written_so() -> None:
    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=chat()[0]) as driver:
            say = driver.app.query_one("#say", Input)
            for letter in "می\u200cخواهم":
                say.post_message(Key("any", letter))
            await driver.settle()
            assert say.value == "می\u200cخواهم"

    asyncio.run(whole())


def test_an_answer_follows_its_question_though_another_waits() -> None:
    talk, session = chat(["one", " two"], ["three"])
    reached, go = hold(session, 2)

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await write_two(driver, reached)
            await until(driver, lambda: said(driver).endswith("first\none\n▶ second"))
            go.set()
            await until(driver, lambda: "tok/s" in said(driver).split("three")[-1])
            assert "▶ first\none two\nprompt 1 " in said(driver) and "▶ second\nthree\nprompt" in said(driver)

    asyncio.run(whole())


def test_leaving_waits_for_no_answer_that_has_not_begun() -> None:
    talk, session = chat(["one", " two"], ["never"])
    reached, go = hold(session, 2)

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await write_two(driver, reached)
            threading.Timer(0.2, go.set).start()

    asyncio.run(whole())
    assert [message["content"] for message in session.messages] == ["first", "one"]


def test_what_was_said_is_left_at_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    talk, session = chat(["[b]Hello\x1b[2J", " there."], document="a word")
    reached, go = hold(session, 1)
    talk.print_all()
    assert capfd.readouterr() == ("", "")

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await write(driver, "hi [b]\x07")
            await until(driver, reached.is_set)
            go.set()
            await until(driver, lambda: "tok/s" in said(driver))
            await write(driver, "/nonsense")
            await until(driver, lambda: "no command" in said(driver))
            capfd.readouterr()

    asyncio.run(whole())
    talk.print_all()
    out, err = capfd.readouterr()
    assert out == "[b]Hello[2J there.\n"
    assert [line.partition(" · ")[0] for line in err.splitlines()[:4]] == [
        "the document is read with your first question", ">>> hi [b]", "prompt 4", ">>> /nonsense"
    ]  # fmt: skip
    assert "no command" in err and "esc goes to the panels" not in err


def test_save_replaces_nothing_but_saved_conversations(tmp_path: Path) -> None:
    talk, _ = chat()
    file = tmp_path / "notes.txt"
    file.write_text("my notes")

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await write(driver, f"/save {file}")
            await until(driver, lambda: "is no saved conversation; take another name" in said(driver))
            assert file.read_text() == "my notes"

    asyncio.run(whole())


def test_what_was_said_can_be_read_back() -> None:
    talk, _ = chat(["one\n" * 30], ["two\n" * 3])

    async def whole() -> None:
        async with running(FakeSource(conversation()), (80, 24), talk=talk) as driver:
            panel = driver.app.query_one(WordsPanel)
            await write(driver, "/help")
            await until(driver, lambda: "ctrl-d" in said(driver))
            await driver.settle()
            assert "/help  " not in driver.text()
            await driver.press("pageup", "pageup", "pageup", "pageup")
            assert "/help  " in driver.text() and "1-4 of 15, pgup and pgdn" in driver.text()
            await write(driver, "count")  # what is said is followed again
            await until(driver, lambda: "tok/s" in said(driver))
            await driver.settle()
            assert "TTFT" in driver.text()
            await driver.pilot._post_mouse_events([MouseScrollUp, MouseScrollUp], WordsPanel, offset=Offset(9, 3))
            await driver.settle()
            top = panel.top
            assert top is not None and "TTFT" not in driver.text()
            await write(driver, "/set topn")
            panel.top = top  # it stays, though more is said
            await until(driver, lambda: "topn = " in said(driver))
            await driver.settle()
            assert panel.top == top and "topn =" not in driver.text()
            await driver.press("pagedown", "pagedown")
            assert panel.top is None and "topn =" in driver.text()

    asyncio.run(whole())


@pytest.mark.parametrize(("name", "size"), [("wide-chat", (120, 40)), ("small-chat", (80, 24))])
def test_how_a_chat_looks(name: str, size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    talk, _ = chat(["The secret code", " is 7413", "."], document="a word " * 20)

    async def whole() -> None:
        async with running(FakeSource(conversation()), size, talk=talk) as driver:
            await write(driver, "what is it?")
            await driver.press("escape")
            await until(driver, lambda: "tok/s" in said(driver).split("7413.")[-1])
            await driver.settle()
            check(driver.app, name, request.config)

    asyncio.run(whole())


def test_ctrl_c_stops_the_reply_and_the_screen_goes_on_meanwhile() -> None:
    talk, session = chat(["one", " two", " three"])
    reached, go = hold(session, 2)

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await write(driver, "count")
            await until(driver, reached.is_set)
            await driver.press("escape", "v")  # the engine hangs, the screen does not
            assert "one" in said(driver)
            await driver.press("ctrl+c")
            assert session.interrupted
            go.set()
            await until(driver, lambda: "stopped" in said(driver))
            assert "three" not in said(driver)

    asyncio.run(whole())


def test_ctrl_c_without_a_reply_names_the_key_that_leaves() -> None:
    async def body(keys: tuple[str, ...], said: str, leaves: str) -> None:
        async with running(FakeSource(conversation()), talk=chat()[0]) as driver:
            await driver.press(*keys, "ctrl+c")
            assert driver.app.is_running and f"nothing to stop; {said} leaves" in driver.text()
            await driver.press(leaves)
            assert not driver.app.is_running

    asyncio.run(body(("h", "i"), "ctrl-d", "ctrl+d"))
    asyncio.run(body(("h", "i", "escape"), "q", "q"))


def test_ctrl_c_while_a_prompt_is_read_says_at_once_what_it_waits_for() -> None:
    talk, session = chat(["one", " two"])
    reached, go = hold(session, 1)

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await write(driver, "count")
            await until(driver, reached.is_set)
            await driver.press("ctrl+c", "ctrl+c")
            await until(driver, lambda: "stopping after this piece" in said(driver))
            assert said(driver).count("stopping") == 1 and "stopped" not in said(driver)
            go.set()
            await until(driver, lambda: "stopped" in said(driver))
            assert "one" not in said(driver)

    asyncio.run(whole())


def test_what_is_said_goes_before_what_is_under_the_cursor() -> None:
    talk, _ = chat()

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await driver.press("escape", "a", "a")
            assert "text from token" in driver.text() and "write below" not in driver.text()
            await driver.press("i")
            assert "write below" in driver.text() and "text from token" not in driver.text()
            await driver.press("escape")
            assert "text from token" in driver.text()

    asyncio.run(whole())


def test_on_a_small_terminal_what_is_said_comes_back_for_who_writes() -> None:
    async def whole() -> None:
        async with running(FakeSource(conversation()), (80, 24), talk=chat()[0]) as driver:
            await driver.press("escape", "4")
            assert "4 layers" in driver.text() and "6 text" not in driver.text()
            await driver.press("i")
            assert "6 text" in driver.text() and "write below" in driver.text()
            await driver.press("escape")
            assert "4 layers" in driver.text()

    asyncio.run(whole())


def test_what_a_toast_says_hides_nothing_of_the_input() -> None:
    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=chat()[0]) as driver:
            await driver.press("ctrl+c")
            assert "nothing to stop" in driver.text() and "esc: panels   ctrl-c: stop the reply" in driver.text()

    asyncio.run(whole())


def test_the_layer_table_comes_when_it_is_asked_for() -> None:
    talk, _ = chat()

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await driver.press("escape")
            assert "4 layers" not in driver.text()
            await driver.press("s")
            assert "4 layers" in driver.text() and "attn▼" in driver.text()
            await driver.press("slash", *"attn<0.9")
            assert "6 text" in driver.text() and "attn<0.9" in driver.text()
            await driver.press("enter")
            assert "attn<0.9  1-8 of 15" in driver.text()

    asyncio.run(whole())


def test_keys_are_text_in_the_input_and_keys_outside_of_it() -> None:
    talk, _ = chat()

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await driver.press("q", "m", "question_mark")
            assert driver.app.is_running and driver.app.maximised is None
            await driver.press("escape", "m")
            assert driver.app.maximised is not None
            await driver.press("m", "i")
            assert driver.app.focused is not None and driver.app.focused.id == "say"

    asyncio.run(whole())


def test_bye_leaves() -> None:
    talk, _ = chat()

    async def whole() -> None:
        async with running(FakeSource(conversation()), talk=talk) as driver:
            await driver.pilot.press(*"/bye", "enter")
            for _ in range(2000):
                if not driver.app.is_running:
                    return
                await asyncio.sleep(0.005)
            raise AssertionError("it is still there")

    asyncio.run(whole())


def test_a_quiet_conversation_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    talk, _ = chat(document="a word " * 100)
    talk.conversation.ask("what?", lambda piece: None)
    assert capsys.readouterr() == ("", "")


class Window:
    """Stands in for a dashboard: is there until it is told to go."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop, self.left, self.ended = stop, threading.Event(), threading.Event()
        self.failed: BaseException | None = None

    def run(self) -> None:
        assert self.left.wait(20)

    def exit(self) -> None:
        self.left.set()

    def work_ended(self, failed: BaseException | None) -> None:
        self.failed = failed
        self.ended.set()


class Meter:
    def __init__(self) -> None:
        self.tokens = 0

    def begin(self, names: Sequence[str]) -> None:
        """Nothing here is named."""

    def count(self, event: Any, tokens: int = 1) -> None:
        self.tokens += tokens

    def read(self, done: int, total: int) -> None:
        """Nothing here is read."""


def beside(meter: Meter, drawn: list[int]) -> Beside:
    @contextmanager
    def progress() -> Iterator[Meter]:
        drawn.append(meter.tokens)
        yield meter

    return Beside(meter, progress)


def run_beside(job: Beside, work: Callable[[], None], act: Callable[[Window], None]) -> None:
    def make(stop: Callable[[], bool]) -> Dashboard:
        window = Window(stop)
        threading.Thread(target=act, args=(window,), daemon=True).start()
        return cast(Dashboard, window)

    job.run(work, make)


def test_a_job_runs_to_its_end_behind_the_dashboard() -> None:
    meter, drawn = Meter(), []
    job = beside(meter, drawn)

    def work() -> None:
        for number in range(5):
            job.count(event(0, "x", None, 1, number))

    def act(window: Window) -> None:
        assert window.ended.wait(20)
        window.left.set()

    run_beside(job, work, act)
    assert meter.tokens == 5 and drawn == []


def test_leaving_the_dashboard_leaves_the_job_with_its_plain_progress() -> None:
    meter, drawn, left = Meter(), [], threading.Event()
    job = beside(meter, drawn)

    def work() -> None:
        job.count(event(0, "x", None, 1, 1))
        assert left.wait(20)
        while not drawn:
            left.wait(0.001)
        job.count(event(0, "x", None, 1, 2))

    def act(window: Window) -> None:
        window.left.set()
        left.set()

    run_beside(job, work, act)
    assert meter.tokens == 2 and drawn == [1]


def test_stopping_the_job_is_an_interrupt_for_the_command() -> None:
    meter, drawn = Meter(), []
    job = beside(meter, drawn)

    def work() -> None:
        while True:
            job.count(event(0, "x", None, 1, 1))

    def act(window: Window) -> None:
        while not meter.tokens:
            window.ended.wait(0.001)
        assert window.stop()
        assert window.ended.wait(20)
        assert not window.stop()
        window.left.set()

    with pytest.raises(KeyboardInterrupt):
        run_beside(job, work, act)


def test_ctrl_c_after_the_dashboard_waits_for_the_job_to_stop() -> None:
    meter, drawn, ended = Meter(), [], threading.Event()
    job = beside(meter, drawn)

    def work() -> None:
        try:
            while True:
                job.count(event(0, "x", None, 1, 1))
                ended.wait(0.001)
        except KeyboardInterrupt:
            ended.wait(0.3)  # a batch is written down
            ended.set()
            raise

    def act(window: Window) -> None:
        window.left.set()
        while not drawn:
            ended.wait(0.001)
        ended.wait(0.1)
        _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        run_beside(job, work, act)
    assert ended.is_set()


def test_a_signal_stops_the_job_behind_the_dashboard_too() -> None:
    meter, drawn = Meter(), []
    job = beside(meter, drawn)

    def work() -> None:
        while True:
            job.read(1, 2)

    def act(window: Window) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with heard() as came, pytest.raises(Ended):
        run_beside(job, work, act)
    assert came == [signal.SIGTERM] and drawn == []


def test_what_goes_wrong_in_the_job_reaches_the_command() -> None:
    job = beside(Meter(), [])

    def work() -> None:
        raise OSError("the disk is full")

    def act(window: Window) -> None:
        assert window.ended.wait(20)
        assert isinstance(window.failed, OSError)
        window.left.set()

    with pytest.raises(OSError, match="disk"):
        run_beside(job, work, act)
