"""A chat at a real terminal, with the keys that a person presses."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kcache_cli.terminal import hushed, typed_ahead

pty = pytest.importorskip("pty", reason="no such terminals on this platform")
ROOT = Path(__file__).parents[2]
LIMIT_S = 20


class Terminal:
    """A program at the other end of a terminal."""

    def __init__(self, *command: str) -> None:
        self.shown = self.seen = b""
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # deaf to them when unattended
                signal.signal(number, signal.SIG_DFL)
            os.execvp(command[0], command)

    def wait_for(self, text: bytes) -> None:
        """Read until the program has shown ``text``, and forget what came before."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.shown:
            assert time.monotonic() < deadline and self._read(), self.shown[-2000:].decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def press(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def exit_code(self) -> int:
        """How the program ends."""
        deadline = time.monotonic() + LIMIT_S
        while self._read() and time.monotonic() < deadline:
            continue
        if time.monotonic() >= deadline:
            os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        """Take in what there is; False once nobody writes any more."""
        if not select.select([self._end], [], [], 0.1)[0]:
            return True
        try:
            found = os.read(self._end, 65536)
        except OSError:  # the program's end is closed
            return False
        if b"\x1b[6n" in found:  # it asks where the cursor is
            self.press(b"\x1b[1;1R")
        self.shown += found
        self.seen += found
        return bool(found)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._end)


@pytest.fixture(params=["kcache", "make"])
def command(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A chat whose first answer is very long, started by itself or by ``make chat``."""
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path))  # what is typed goes into no history but its own
    command = [sys.executable, "-m", "tests.cli.killable"]
    if request.param == "kcache":
        return [*command, "chat"]
    if not shutil.which("make") or not shutil.which("bash"):
        pytest.skip("make chat needs make and bash, which are not both here")
    program = tmp_path / "bin" / "kcache"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
    program.chmod(0o755)
    (tmp_path / ".installed").touch()
    return ["make", "chat", f"VENV={tmp_path}"]


@pytest.fixture
def chat(command: list[str]) -> Iterator[Terminal]:
    """The chat at a terminal of its own."""
    terminal = Terminal(*command)
    yield terminal
    terminal.close()


@pytest.fixture
def shell() -> Iterator[Terminal]:
    """A shell with job control."""
    if not shutil.which("bash"):
        pytest.skip("stopping a job and bringing it back needs a shell with job control, and bash is not here")
    terminal = Terminal("bash", "--norc", "--noprofile", "-i")
    yield terminal
    terminal.close()


@pytest.mark.parametrize("busy", [False, True], ids=["waiting", "answering"])
def test_a_signal_ends_a_chat_and_not_only_its_reply(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path))
    terminal = Terminal(sys.executable, "-m", "tests.cli.killable", "chat")
    terminal.wait_for(b">>>")
    if busy:
        terminal.press(b"go on\r")
        terminal.wait_for(b"word word")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.exit_code() == 143
    assert b"Traceback" not in terminal.seen
    terminal.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_closes_the_dashboard_and_gives_the_terminal_back(number: int) -> None:
    recording = str(ROOT / "tests" / "watch" / "earlier.kcr")
    terminal = Terminal(sys.executable, "-m", "kcache_cli", "inspect", recording)
    terminal.wait_for(b"\x1b[?1049h")
    terminal.wait_for(b"memory")
    os.kill(terminal.pid, number)
    assert terminal.exit_code() == 128 + number
    assert b"\x1b[?1049l" in terminal.shown, "the screen it was drawn on is left"
    assert b"\x1b[?1000l" in terminal.shown, "and the mouse let go"
    assert b"\x1b[?25h" in terminal.shown, "and the cursor seen"
    assert b"Traceback" not in terminal.seen
    terminal.close()


@pytest.mark.parametrize("leave", [b"\x04", b"/quit\r"], ids=["ctrl-d", "quit"])
def test_leaving_after_a_stopped_reply_is_no_failure(chat: Terminal, leave: bytes) -> None:
    chat.wait_for(b">>>")
    chat.press(b"go on\r")
    chat.wait_for(b"word word")
    chat.press(b"\x03")
    chat.wait_for(b"stopped")
    chat.wait_for(b">>>")
    chat.press(leave)
    assert chat.exit_code() == 0


def test_ctrl_z_stops_it_and_fg_brings_it_back(command: list[str], shell: Terminal) -> None:
    """At the prompt, in the middle of an answer, and once more; what a reply was asked for comes afterwards."""
    shell.press(f"{shlex.join(command)}\r".encode())
    shell.wait_for(b">>>")
    shell.press(b"\x1a")
    shell.wait_for(b"Stopped")
    shell.press(b"fg; echo left with $?\r")
    shell.wait_for(b">>>")
    shell.press(b"go on\r")
    for _ in range(2):
        shell.wait_for(b"word word")
        shell.press(b"\x1a")
        shell.wait_for(b"Stopped")
        shell.press(b"fg; echo left with $?\r")
    shell.wait_for(b"word word")
    before = len(shell.seen)
    shell.press(b"qqq")
    for _ in range(5):
        shell.wait_for(b"word word")
    assert b"q" not in shell.seen[before:], "keys stay out of the answer"
    shell.press(b"\x03")
    shell.wait_for(b"stopped")
    shell.wait_for(b">>>")
    shell.press(b"\x15\x04")  # what was typed meanwhile is there, and goes
    shell.wait_for(b"left with 0")


def test_keys_stay_out_of_a_progress_bar(tmp_path: Path) -> None:
    """An echo at the end of a bar as wide as the terminal begins a line, and the bar would be drawn once more."""
    prompts = tmp_path / "in.txt"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(2000)))
    files = "-i", str(prompts), "-o", str(tmp_path / "out.jsonl")
    terminal = Terminal(sys.executable, "-m", "tests.cli.killable", "generate", *files)
    terminal.wait_for(b"/2,000 prompts")
    before = len(terminal.seen)
    terminal.press(b"qqq")
    terminal.wait_for(b"/2,000 prompts")
    terminal.press(b"\x03")
    terminal.wait_for(b"stopped")
    assert terminal.exit_code() == 130
    drawn = terminal.seen[before:]
    assert b"qqq" not in drawn and b"^C" not in drawn
    terminal.close()


def test_what_was_typed_ahead_is_taken_once_as_text() -> None:
    import termios

    far, near = pty.openpty()
    with open(near, closefd=False) as terminal:
        before = termios.tcgetattr(near)
        os.write(far, "one\rné\x1b[A\x1bOPxt\x7f\x1b".encode())
        select.select([near], [], [], 10)  # the terminal takes it in, the erased letter out, in its own time
        assert typed_ahead(terminal) == "one\nnéx"
        assert typed_ahead(terminal) == typed_ahead(None) == ""
        assert termios.tcgetattr(near) == before
    os.close(near)
    os.close(far)


def test_a_terminal_that_controls_nobody_is_hushed_too() -> None:
    import termios

    def echoes() -> bool:
        return bool(termios.tcgetattr(near)[3] & termios.ECHO)

    far, near = pty.openpty()
    with open(near, closefd=False) as terminal:
        with hushed(terminal):
            assert not echoes()
        assert echoes()
    os.close(near)
    os.close(far)


def test_a_terminal_may_be_taken_away_while_it_is_hushed() -> None:
    far, near = pty.openpty()
    with open(near, closefd=False) as terminal, hushed(terminal):
        os.close(far)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(near, b"x")
    os.close(near)
