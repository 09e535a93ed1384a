"""A conversation whose cache is kept between turns, so a turn prefills only what is new."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from kcache.cache import KCache
from kcache.decoding.forward import Read
from kcache.decoding.prompts import Message, alike, check_length, check_messages, encode_messages
from kcache.decoding.sampling import Sampling
from kcache.errors import InputError, PolicyError, expect
from kcache.generation import TokenEvent, stop_texts, stream
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy


@dataclass(frozen=True)
class TurnStats:
    """Figures of one answered turn.

    Attributes
    ----------
    prompt_tokens, new_prompt_tokens, completion_tokens : int
        The whole prompt, the part of it that had to be prefilled, and the answer.
    ttft_ms, tok_s : float
        Time to the first token, and decode speed after it.
    link_bytes_per_token : float
        Bytes brought from the host tier per decode step.
    """

    prompt_tokens: int
    new_prompt_tokens: int
    completion_tokens: int
    ttft_ms: float
    tok_s: float
    link_bytes_per_token: float


class Session:
    """A chat with a model.

    Parameters
    ----------
    lm : LoadedModel
    policy : Policy, optional
        May be set between turns; the cache is then made anew at the next one.
    system : str, optional
        System message.
    sampling : Sampling, optional
    max_length : int, optional
        Tokens to make room for; by default the cache grows as needed.
    allow_overflow : bool
        Let the conversation exceed the model's context.

    Raises
    ------
    InputError, PolicyError
        If an argument is something else.
    """

    def __init__(
        self,
        lm: LoadedModel,
        policy: Policy | None = None,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        allow_overflow: bool = False,
    ) -> None:
        self.lm = lm
        self.policy = Policy() if policy is None else policy
        self.sampling = Sampling() if sampling is None else sampling
        expect(LoadedModel, "lm", lm, "what kcache.load returns")
        expect(Policy, "policy", self.policy, "a kcache.Policy, such as Policy(topn=64)", PolicyError)
        expect(Sampling, "sampling", self.sampling, "a kcache.Sampling, such as Sampling(temperature=0)")
        self.max_length = max_length
        self.allow_overflow = allow_overflow
        self.messages: list[Message] = []
        self.cache: KCache | None = None
        self.last_turn: TurnStats | None = None
        self._system = system
        self._fed: list[int] = []
        self._stop_asked = False
        self._open: weakref.ref[Generator[TokenEvent]] | None = None  # a reply nobody holds any more ends by itself

    @property
    def system(self) -> str | None:
        """The system message; setting it empties the cache."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._close_reply()
        self._system = text
        self._drop_cache()

    def clear(self) -> None:
        """Forget the conversation and give the cache's memory back; the system message stays."""
        self._close_reply()
        self.messages = []
        self.last_turn = None
        self._drop_cache()

    def load_messages(self, messages: Sequence[Message]) -> None:
        """Go on from another conversation; a leading system message becomes the session's.

        Raises
        ------
        InputError
            If a message is not a ``{"role", "content"}`` pair of strings.
        """
        check_messages(messages)
        self._close_reply()
        rest = [dict(message) for message in messages]
        if rest and rest[0]["role"] == "system":
            self._system = rest.pop(0)["content"]
        self.messages = rest
        self._drop_cache()

    def interrupt(self) -> None:
        """Ask the reply under way to stop after the current token or prefill chunk; safe from a signal handler."""
        self._stop_asked = True

    def prompt_tokens(self, text: str) -> int:
        """How many tokens the prompt would be if ``text`` were sent now."""
        return len(encode_messages(self.lm, self._with_system(text)))

    def send(
        self, text: str, *, max_new_tokens: int = 1024, stop: str | Sequence[str] = (), read: Read | None = None
    ) -> Iterator[TokenEvent]:
        """Send a user message and stream the answer.

        ``read`` is told, while the prompt is read, how many of its new tokens have been taken in, and of how many.
        Closing the iterator early, or :meth:`interrupt`, keeps what was said so far; so does the next message.

        Raises
        ------
        InputError
            If the message is empty or the model has no chat template.
        ContextLengthError
            If the conversation no longer fits the model's context.
        DoesNotFitError
            If the cache does not fit in memory.
        """
        expect(str, "the message", text, "a string")
        if not text.strip():
            raise InputError("the message is empty")
        stops = stop_texts(stop)
        self._close_reply()
        self._stop_asked = False
        ids = encode_messages(self.lm, self._with_system(text))
        room = check_length(self.lm, len(ids), max_new_tokens, self.allow_overflow)
        new = ids[self._keep_prefix(ids) :]
        assert self.cache is not None
        reply = self._reply(text, ids, new, self.cache, room, stops, read)
        self._open = weakref.ref(reply)
        return reply

    def _reply(
        self,
        text: str,
        ids: list[int],
        new: list[int],
        cache: KCache,
        room: int,
        stop: Sequence[str],
        read: Read | None,
    ) -> Generator[TokenEvent]:
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        last: TokenEvent | None = None
        link_bytes = 0
        steps = cache.stats.steps
        clean = False
        events = stream(
            self.lm, [new], cache, self.sampling, room, stop, lambda: not self._stop_asked, self._fed, read=read
        )
        try:
            for event in events:
                if last is None:
                    link_bytes, steps = cache.stats.bytes_h2d, cache.stats.steps
                said.append(event.text)
                last = event
                clean = True
                yield event
                clean = False
            clean = True
        finally:
            events.close()  # type: ignore[attr-defined]
            self._end_turn(said, last, len(ids), len(new), cache, link_bytes, steps)
            if not clean:
                self._drop_cache()

    def _end_turn(
        self,
        said: list[str],
        last: TokenEvent | None,
        prompt: int,
        new: int,
        cache: KCache,
        link_bytes: int,
        steps: int,
    ) -> None:
        if last is None:
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": "".join(said)})
        stats = cache.stats
        decode_s = (last.elapsed_ms - last.ttft_ms) / 1e3
        self.last_turn = TurnStats(
            prompt_tokens=prompt,
            new_prompt_tokens=new,
            completion_tokens=last.completion_tokens,
            ttft_ms=last.ttft_ms,
            tok_s=(last.completion_tokens - 1) / decode_s if decode_s > 0 else 0.0,
            link_bytes_per_token=(stats.bytes_h2d - link_bytes) / max(1, stats.steps - steps),
        )

    def _with_system(self, text: str) -> list[Message]:
        head = [{"role": "system", "content": self._system}] if self._system is not None else []
        return [*head, *self.messages, {"role": "user", "content": text}]

    def _keep_prefix(self, ids: list[int]) -> int:
        """Cut the cache back to what it shares with the prompt; returns how many tokens that is."""
        if self.cache is not None and self.cache.get_seq_length() != len(self._fed):  # somebody else has changed it
            self._drop_cache()
        shared = min(alike(self._fed, ids), len(ids) - 1)
        if self.cache is not None and (self.cache.policy != self.policy or shared == 0):
            self._drop_cache()
        if self.cache is not None and shared < len(self._fed):
            try:
                self.cache.crop(shared - len(self._fed))
            except RuntimeError:
                self._drop_cache()
        if self.cache is None:
            self.cache = KCache(self.lm.model, self.policy, max_length=self.max_length)
            self._fed = []
            return 0
        self._fed = self._fed[:shared]
        return shared

    def _close_reply(self) -> None:
        """End a reply that was not read to its end."""
        reply = None if self._open is None else self._open()
        if reply is not None:
            reply.close()

    def _drop_cache(self) -> None:
        self.cache = None
        self._fed = []
