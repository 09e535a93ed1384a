"""A chat as the command line sees it: the session, what to tell it, and what to print after each answer.

The answer goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from kcache.errors import ContextLengthError, InputError
from kcache_cli.chat.figures import Figures
from kcache_cli.console import working
from kcache_cli.terminal import hushed

if TYPE_CHECKING:
    from kcache import Session

Write = Callable[[str], None]
STOPPING = "stopping after this piece of the prompt…"
_LONG_PROMPT = 1024


@dataclass
class Reply:
    """What became of one message."""

    text: str = ""
    finish_reason: str | None = None
    interrupted: bool = False
    figures: Figures | None = None
    ending: str | None = None
    """What there is to say of an answer that did not end by itself."""


@dataclass
class Conversation:
    """A session with the document that waits for the first question, and the longest answer wanted.

    A ``quiet`` one says nothing on standard error while a prompt is read. One for ``once`` is asked one thing alone.
    """

    session: Session
    model: str
    max_tokens: int
    host_only: bool
    document: str | None = None
    quiet: bool = False
    once: bool = False
    _reading: Write | None = field(default=None, init=False, repr=False)

    def compose(self, message: str) -> str:
        """Put the document before the first question, in the same message."""
        if self.document is None or self.session.messages:
            return message
        return f"{self.document.rstrip()}\n\n{message}"

    def check_document(self) -> None:
        """Refuse a document that leaves no room for a question.

        Raises
        ------
        InputError
            Saying both sizes.
        """
        context = self.session.lm.context_length
        if self.document is None or context is None or self.session.allow_overflow:
            return
        tokens = self.session.prompt_tokens(self.document)
        if tokens >= context:
            raise InputError(
                f"the document is {tokens:,} tokens and the context of {self.model} is {context:,}; "
                "give a shorter one, or use --allow-overflow"
            )

    def stop(self) -> None:
        """Ask the reply to stop: at its next token, or after the piece of the prompt that is being read, and say so.

        Safe from a signal handler and from any thread.
        """
        self.session.interrupt()
        reading, self._reading = self._reading, None
        if reading is not None:
            reading(STOPPING)

    def ask(self, message: str, write: Write, remark: Write | None = None) -> Reply:
        """Send a message and stream the answer to ``write``.

        Ctrl-C is left to the caller; what was said until then stays in the conversation. What there is to say while the
        prompt is read goes to standard error, or of a quiet conversation to ``remark``.
        """
        if not message.strip():
            raise InputError("the message is empty")
        text = self.compose(message)
        reply = Reply()
        said: list[str] = []
        events: Any = self._send(text)
        with ExitStack() as waiting:
            waiting.callback(events.close)
            spinner = waiting.enter_context(ExitStack())
            self._reading = remark if self.quiet else spinner.enter_context(working(self._label(text)))
            spinner.callback(self._has_read)
            for event in events:
                spinner.close()
                said.append(event.text)
                write(event.text)
                reply.finish_reason = event.finish_reason
        reply.text = "".join(said)
        reply.interrupted = reply.finish_reason is None
        if said:
            reply.figures = Figures.of(self.session)
        reply.ending = self._ending(reply)
        return reply

    def _send(self, text: str) -> Any:
        try:
            return self.session.send(text, max_new_tokens=self.max_tokens, read=self._say_how_far)
        except ContextLengthError as error:
            if self.session.messages:
                raise ContextLengthError(f"{error}; /clear begins anew") from None
            raise

    def _ending(self, reply: Reply) -> str | None:
        if reply.interrupted:
            return "stopped"
        if reply.finish_reason != "length":
            return None
        if reply.figures is not None and reply.figures.completion_tokens < self.max_tokens:
            return "the answer is cut, the context is full" + ("" if self.once else " · /clear begins anew")
        more = "-n" if self.once else "-n or /set max_tokens"
        return f"the answer is cut at {self.max_tokens:,} tokens · {more} allows more"

    def _say_how_far(self, done: int, total: int) -> None:
        """Say on a spinner how far a long prompt has been read; a log has had its line, and a dashboard its map."""
        if self._reading is not None and total >= _LONG_PROMPT and not self.quiet and sys.stderr.isatty():
            self._reading(f"reading {total:,} tokens, {done / total:.0%}")

    def _has_read(self) -> None:
        self._reading = None

    def _label(self, text: str) -> str:
        """What to say while the prompt is read; long prompts are named on standard error in any case."""
        tokens = self.session.prompt_tokens(text)
        label = f"reading {tokens:,} tokens" if tokens >= _LONG_PROMPT else "thinking"
        if tokens >= _LONG_PROMPT and not sys.stderr.isatty():
            print(f"kcache: {label}", file=sys.stderr, flush=True)
        return label


@contextmanager
def stop_on_ctrl_c(conversation: Conversation) -> Iterator[None]:
    """Let Ctrl-C stop the reply alone: at the next token or piece of the prompt, or at once when pressed again."""
    pressed = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        conversation.stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        with hushed(sys.stdin):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
