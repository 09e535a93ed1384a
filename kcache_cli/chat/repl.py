"""The chat loop: read a line or a slash command, answer, print the footer, again."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from kcache_cli.chat import slash
from kcache_cli.chat.conversation import Conversation, stop_on_ctrl_c
from kcache_cli.chat.figures import between_figures
from kcache_cli.chat.writer import AnswerWriter
from kcache_cli.console import console, put, terminal_width
from kcache_cli.ending import Ended
from kcache_cli.exits import debugging, describe
from kcache_cli.text import json_line, printable

Read = Callable[[], str]
_KEYS = {
    '"""': "begins and ends a message of several lines",
    "Ctrl-C": "stops the reply, or the reading; twice: at once",
    "Ctrl-D": "leaves",
}


class Repl:
    """A chat at a terminal.

    Parameters
    ----------
    conversation : Conversation
    read : callable
        Returns what the user typed; raises ``EOFError`` to leave and ``KeyboardInterrupt`` to start the line anew.
    as_json : bool
        Print an object per answer instead of text.
    """

    def __init__(self, conversation: Conversation, read: Read, as_json: bool = False) -> None:
        self.conversation = conversation
        self.as_json = as_json
        self._read = read
        self._console = console()

    def run(self) -> None:
        """Loop until the user leaves."""
        self._greet()
        while True:
            try:
                self._turn(self._next())
            except Ended:
                raise
            except KeyboardInterrupt:
                self.say("Ctrl-D or /bye leaves")
            except (EOFError, slash.Leave):
                return
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except Exception as error:  # whatever it is, the conversation goes on
                if debugging():
                    raise
                put(self._console, printable(describe(error)), "red")

    def say(self, text: str) -> None:
        """Print a remark; it is no part of any answer."""
        put(self._console, printable(between_figures(text, terminal_width())), "dim")

    def _greet(self) -> None:
        context = self.conversation.session.lm.context_length
        about = [self.conversation.model]
        if context is not None:
            about.append(f"context {context:,} tokens")
        if self.conversation.host_only:
            about.append("host-only run: both tiers are RAM")
        self.say(" · ".join([*about, "/help"]))
        if self.conversation.document is not None:
            self.say("the document is read with your first question")

    def _next(self) -> str:
        """What the user types next; ``EOFError`` also when the terminal has been taken away."""
        try:
            return self._read()
        except Exception as error:
            if error.args[:1] == (errno.EIO,):  # an OSError, or termios' own kind of error
                raise EOFError from None
            raise

    def _turn(self, line: str) -> None:
        if not line.strip():
            return
        command = slash.parse(line)
        if command is not None:
            slash.run(self.conversation, *command, self.say, _KEYS)
            return
        self._answer(unquote(line))

    def _answer(self, message: str) -> None:
        answer = AnswerWriter()
        reply = ending = None
        try:
            with stop_on_ctrl_c(self.conversation):
                reply = self.conversation.ask(message, _unseen if self.as_json else answer.write)
                ending = reply.ending
        except Ended:
            raise
        except KeyboardInterrupt:
            ending = "stopped"
        finally:
            if answer.has_begun:
                answer.end()
        if ending is not None:
            self.say(ending)
        if reply is None or reply.figures is None:
            return
        if self.as_json:
            print(json_line(reply.figures.to_json(reply.text, reply.finish_reason)), flush=True)
        else:
            self.say(reply.figures.footer(self.conversation.host_only))


def _unseen(piece: str) -> None:
    """Print nothing of an answer that is printed as a whole."""


def unquote(line: str) -> str:
    '''Take the ``"""`` off a message of several lines.'''
    text = line.strip()
    if text.startswith('"""'):
        return text[3:].removesuffix('"""').strip("\n")
    return line


def is_open(text: str) -> bool:
    '''Whether a message began with ``"""`` and has not ended.'''
    stripped = text.strip()
    return stripped.startswith('"""') and not (len(stripped) >= 6 and stripped.endswith('"""'))


def answer_once(conversation: Conversation, message: str, as_json: bool) -> None:
    """Answer one message on standard output, for a script or a pipe."""
    if as_json:
        reply = conversation.ask(message, _unseen)
        if reply.figures is not None:
            print(json_line(reply.figures.to_json(reply.text, reply.finish_reason)), flush=True)
        return
    answer = AnswerWriter()
    reply = conversation.ask(message, answer.write)
    answer.end()
    if reply.ending is not None:
        print(reply.ending, file=sys.stderr)
    if reply.figures is not None:
        footer = reply.figures.footer(conversation.host_only)
        print(between_figures(footer, terminal_width()), file=sys.stderr)
