"""What is typed at the prompt, key by key."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from kcache_cli.chat.prompt import Prompt, SlashCompleter, open_history


def typed(keys: str, history: Path) -> str:
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        return Prompt(history, input=pipe, output=DummyOutput()).read()


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history"


def test_enter_ends_a_line(history: Path) -> None:
    assert typed("hello\r", history) == "hello"


def test_three_quotes_take_several_lines(history: Path) -> None:
    assert typed('"""one\rtwo\r\rthree"""\r', history) == '"""one\ntwo\n\nthree"""'


def test_pasted_lines_stay_one_message(history: Path) -> None:
    assert typed("\x1b[200~one\ntwo\x1b[201~\r", history) == "one\ntwo"


def test_ctrl_d_leaves_and_ctrl_c_interrupts(history: Path) -> None:
    with pytest.raises(EOFError):
        typed("\x04", history)
    with pytest.raises(KeyboardInterrupt):
        typed("half\x03", history)


def test_history_is_kept_for_its_owner_alone(history: Path) -> None:
    typed("remember me\r", history)
    assert "remember me" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert typed("\x1b[A\r", history) == "remember me"


def test_history_that_others_could_read_is_closed(history: Path) -> None:
    history.parent.mkdir()
    history.write_text("")
    history.chmod(0o644)
    open_history(history)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_history_without_a_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert isinstance(open_history(tmp_path / "file" / "history"), InMemoryHistory)


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("/s", ["/set", "/stats", "/save", "/system"]),
        ("/b", ["/bye"]),
        ("/set temp", ["temperature"]),
        ("/set temperature 0", []),
        ("hello", []),
    ],
)
def test_completion(text: str, offered: list[str]) -> None:
    found = SlashCompleter().get_completions(Document(text), CompleteEvent())
    assert [completion.text for completion in found] == offered


def test_completion_of_files(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("")
    found = SlashCompleter().get_completions(Document(f"/load {tmp_path}/ta"), CompleteEvent())
    assert [completion.text for completion in found] == ["lk.json"]


def test_keys_end_when_the_terminal_is_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    pty = pytest.importorskip("pty", reason="no such terminals on this platform")
    from kcache_cli.chat.keyboard import Keyboard

    far, near = pty.openpty()
    with os.fdopen(far), os.fdopen(near) as terminal:
        keyboard = Keyboard(terminal)
        os.write(far, b"x\n")
        assert [press.data for press in keyboard.read_keys()] == ["x", "\n"]
        assert keyboard.read_keys() == [] and not keyboard.closed
        monkeypatch.setattr("kcache_cli.chat.keyboard.in_foreground", lambda descriptor: False)
        assert keyboard.read_keys() == [] and keyboard.closed
