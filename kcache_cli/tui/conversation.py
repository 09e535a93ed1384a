"""The chat behind ``kcache chat --dashboard``: the engine in a thread of its own, what is said as text.

The screen asks for :meth:`Conversing.text` when it is told that something was said; the engine never waits for it.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import TYPE_CHECKING, Literal

from rich.text import Text
from textual.message import Message

from kcache_cli.chat import slash
from kcache_cli.chat.conversation import Conversation
from kcache_cli.chat.figures import between_figures
from kcache_cli.chat.repl import unquote
from kcache_cli.chat.writer import AnswerWriter
from kcache_cli.console import console, put, terminal_width
from kcache_cli.exits import describe
from kcache_cli.text import printable
from kcache_cli.tui.look import Look

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from textual.app import App

Who = Literal["you", "model", "remark", "error"]
_STYLES = {"you": None, "remark": "dim", "error": "red"}
_LOOK_S = 0.2
_KEYS = {
    "pgup, pgdn": "read back in what was said, and on",
    "esc": "goes to the panels, where ? lists keys; i comes back",
    "ctrl-c": "stops the reply, or the reading",
    "ctrl-d": "leaves",
}
_GREETING = "write below; /help lists commands, esc goes to the panels, ctrl-c stops a reply"


class Said(Message):
    """Something was said."""


class Conversing:
    """A conversation whose engine runs in a thread; see :class:`~kcache_cli.tui.talk.Talk`.

    Parameters
    ----------
    conversation : Conversation
        Quiet: it draws nothing itself.
    history : History, optional
        Where what the user writes is kept from one chat to the next.

    Attributes
    ----------
    earlier : list of str
        See :class:`~kcache_cli.tui.talk.Talk`.
    """

    def __init__(self, conversation: Conversation, history: History | None = None) -> None:
        self.conversation = conversation
        self._history = history
        self.earlier = [] if history is None else [unquote(text) for text in history.load_history_strings()][::-1]
        self._lines: list[tuple[Who, list[str]]] = [("remark", [_GREETING])]
        self._waiting = 0  # of the lines the last, which are questions that are not answered yet
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._app: App | None = None
        self._busy = self._closed = False
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kcache-engine", daemon=True)
        if conversation.document is not None:
            self._lines.append(("remark", ["the document is read with your first question"]))

    def begin(self, app: App) -> None:
        """See :class:`~kcache_cli.tui.talk.Talk`."""
        self._app = app
        self._thread.start()
        self._tell()

    def say(self, text: str) -> None:
        """See :class:`~kcache_cli.tui.talk.Talk`."""
        if text not in self.earlier[-1:]:
            self.earlier.append(text)
            if self._history is not None:
                self._history.append_string(text)
        self._add("you", text)
        self._asked.put(text)

    def stop(self) -> bool:
        """See :class:`~kcache_cli.tui.talk.Talk`."""
        if self._busy:
            self.conversation.stop()
        return self._busy

    def close(self) -> None:
        """Stop the reply and the thread."""
        self._app = None
        self._closed = True
        self._asked.put(None)
        while self._thread.is_alive():
            self.stop()  # again for one that was just beginning
            self._thread.join(_LOOK_S)

    def text(self, look: Look) -> Text:
        """Everything that was said, styled."""
        self._told.clear()
        palette = look.palette
        tones = {"you": palette.prompt, "model": palette.answer, "remark": palette.muted, "error": palette.bad}
        text = Text()
        for number, (who, said) in enumerate(self._so_far()):
            if number:
                text.append("\n")
            if who == "you":
                text.append(f"{look.signs.play} ", f"bold {palette.accent}")
            text.append(printable(said), tones[who])
        return text

    def print_all(self) -> None:
        """Leave at the terminal what was said, as a chat without a dashboard does; nothing if nothing was asked."""
        lines = self._so_far()[1:]  # the greeting is of keys that are gone
        if not any(who == "you" for who, _ in lines):
            return
        terminal = console()
        for who, said in lines:
            if who == "model":
                answer = AnswerWriter()
                answer.write(said)
                answer.end()
            else:
                shown = between_figures(said, terminal_width()) if who == "remark" else said
                put(terminal, printable(f">>> {said}" if who == "you" else shown), _STYLES[who])

    def _so_far(self) -> list[tuple[Who, str]]:
        with self._lock:
            lines = [(who, "".join(parts)) for who, parts in self._lines]
        return [(who, said) for who, said in lines if said or who != "model"]

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None and not self._closed:
            self._busy = True
            with self._lock:
                self._waiting -= 1
            try:
                self._answer(asked)
            except slash.Leave:
                if self._app is not None:
                    self._app.call_from_thread(self._app.exit)
            except Exception as error:  # whatever it is, the conversation goes on
                self._add("error", describe(error))
            finally:
                self._busy = False

    def _answer(self, asked: str) -> None:
        command = slash.parse(asked)
        if command is not None:
            slash.run(self.conversation, *command, self._remark, _KEYS)
            return
        answer = self._add("model", "")
        reply = self.conversation.ask(asked, partial(self._write, answer), self._remark)
        if reply.ending is not None:
            self._remark(reply.ending)
        if reply.figures is not None:
            tokens, _, _ = reply.figures.footer(self.conversation.host_only).partition("\n")
            self._remark(tokens)  # the panels say the rest

    def _remark(self, text: str) -> None:
        self._add("remark", text)

    def _write(self, parts: list[str], piece: str) -> None:
        with self._lock:
            parts.append(piece)
        self._tell()

    def _add(self, who: Who, text: str) -> list[str]:
        """Begin a line, before the questions that wait; returns its parts, for :meth:`_write`."""
        parts = [text]
        with self._lock:
            if who == "you":
                self._waiting += 1
                self._lines.append((who, parts))
            else:
                self._lines.insert(len(self._lines) - self._waiting, (who, parts))
        self._tell()
        return parts

    def _tell(self) -> None:
        """Tell the screen, unless it knows and has not looked yet."""
        if self._app is not None and not self._told.is_set():
            self._told.set()
            self._app.post_message(Said())
