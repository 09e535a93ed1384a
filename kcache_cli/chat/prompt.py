"""Reading what the user types: history, several lines, completion of slash commands."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from kcache_cli.chat.repl import is_open
from kcache_cli.chat.slash import COMMANDS, SET_NAMES
from kcache_cli.ending import closed_first

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

_SOON_S = 0.02


class SlashCompleter(Completer):
    """Completes slash commands, names after ``/set`` and files after ``/save`` and ``/load``."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What could follow the text before the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text.partition(" ")
        if not space:
            for command in COMMANDS:
                if command.startswith(name):
                    yield Completion(command, -len(name), display_meta=COMMANDS[command].help)
        elif name == "/set" and " " not in argument:
            yield from (Completion(word, -len(argument)) for word in SET_NAMES if word.startswith(argument))
        elif name in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)


def open_history(path: Path) -> History:
    """The history kept in ``path``, for its owner's eyes only; one in memory where that cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


class Prompt:
    """Reads one message at a time from the terminal."""

    def __init__(self, history: Path, *, input: Input | None = None, output: Output | None = None) -> None:
        self._session: PromptSession[str] = PromptSession(
            message=">>> ",
            prompt_continuation="... ",
            history=open_history(history),
            completer=SlashCompleter(),
            complete_while_typing=False,
            multiline=Condition(_typing_several_lines),
            enable_history_search=True,
            enable_suspend=True,
            input=input or _terminal_input(),
            output=output or _terminal_output(),
        )

    def read(self) -> str:
        """Return what was typed; ``EOFError`` on Ctrl-D, ``KeyboardInterrupt`` on Ctrl-C."""
        with closed_first(self._leave):
            return self._session.prompt()
        raise EOFError  # closed by a signal that has done nothing else

    def _leave(self) -> None:
        """Close the prompt, as soon as it is there."""
        app = self._session.app
        if not app.is_running:
            asyncio.get_running_loop().call_later(_SOON_S, self._leave)
        elif not app.is_done:
            app.exit(exception=EOFError())


def _typing_several_lines() -> bool:
    return is_open(get_app().current_buffer.text)


def _terminal_input() -> Input | None:
    """The terminal that notices when it is taken away; None for what prompt_toolkit takes by itself."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        return None
    from kcache_cli.chat.keyboard import Keyboard

    return Keyboard(sys.stdin)


def _terminal_output() -> Any:
    """The terminal, also where standard output is a file that answers go to."""
    from prompt_toolkit.output import create_output

    return create_output(always_prefer_tty=True)
