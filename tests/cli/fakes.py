"""An engine without a model: a token is a word, answers are known beforehand, time stands still."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from kcache.errors import ContextLengthError, InputError
from kcache.models.progress import Progress
from kcache.policy import Policy
from kcache.telemetry import Stats
from kcache_cli.engine import Plan
from kcache_cli.options import ModelOptions, SamplingOptions

if TYPE_CHECKING:
    from kcache import Sampling, TokenEvent, TurnStats


class FakeEvent(NamedTuple):
    """Like :class:`kcache.TokenEvent`, whose module imports torch."""

    index: int
    token_id: int
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    elapsed_ms: float
    ttft_ms: float


@dataclass(frozen=True)
class FakeSampling:
    """Like :class:`kcache.Sampling`, unchecked."""

    temperature: float | None = None
    seed: int | None = None


@dataclass
class FakeModel:
    name: str = "fake"
    context_length: int | None = 512


@dataclass
class FakeCache:
    stats: Stats = field(
        default_factory=lambda: Stats(device_bytes=3 * 2**20, host_bytes=2**20, full_kv_bytes=4 * 2**20, steps=5)
    )


def event(index: int, text: str, reason: Any, prompt: int, count: int) -> TokenEvent:
    return cast("TokenEvent", FakeEvent(index, count, text, reason, prompt, count, 100.0 * count, 100.0))


class FakeSession:
    """Answers with the next of ``answers``, a piece per token."""

    def __init__(self, lm: FakeModel, policy: Policy, answers: Sequence[Sequence[str]], **options: Any) -> None:
        self.lm, self.policy = lm, policy
        self.answers = [list(answer) for answer in answers]
        self.system = options.get("system")
        self.sampling: Sampling = options.get("sampling") or _sampling()
        self.max_length = options.get("max_length")
        self.allow_overflow = options.get("allow_overflow", False)
        self.messages: list[dict[str, str]] = []
        self.cache: FakeCache | None = None
        self.last_turn: TurnStats | None = None
        self.interrupted = False
        self.room = 10**9
        self.before_token: Any = lambda number: None

    def prompt_tokens(self, text: str) -> int:
        return sum(len(message["content"].split()) for message in self.messages) + len(text.split())

    def interrupt(self) -> None:
        self.interrupted = True

    def clear(self) -> None:
        self.messages, self.cache, self.last_turn = [], None, None

    def load_messages(self, messages: Sequence[dict[str, str]]) -> None:
        rest = [dict(message) for message in messages]
        if rest and rest[0]["role"] == "system":
            self.system = rest.pop(0)["content"]
        self.messages, self.cache = rest, None

    def send(
        self, text: str, *, max_new_tokens: int = 1024, stop: Sequence[str] = (), read: Any = None
    ) -> Iterator[TokenEvent]:
        tokens = self.prompt_tokens(text)
        if self.lm.context_length is not None and tokens >= self.lm.context_length and not self.allow_overflow:
            raise ContextLengthError(f"the prompt is {tokens} tokens and the context is {self.lm.context_length}")
        return self._reply(text, tokens, max_new_tokens)

    def _reply(self, text: str, tokens: int, max_new_tokens: int) -> Iterator[TokenEvent]:
        self.interrupted = False
        whole = self.answers.pop(0) if self.answers else ["yes"]
        answer = whole[: min(max_new_tokens, self.room)]
        last = "stop" if answer == whole else "length"
        said: list[str] = []
        self.messages.append({"role": "user", "content": text})
        try:
            for number, piece in enumerate(answer, start=1):
                self.before_token(number)
                if self.interrupted:
                    return
                said.append(piece)
                yield event(0, piece, last if number == len(answer) else None, tokens, number)
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
                self.cache = FakeCache()
                from kcache import TurnStats

                self.last_turn = TurnStats(tokens, tokens, len(said), 100.0, 10.0, 2048.0)
            else:
                self.messages.pop()


class FakeEngine:
    """Stands in for kcache.

    Parameters
    ----------
    answers : what sessions say, one list of pieces per turn
    fails : raised when the plan is made, as for an unknown model
    step_s : time a decode step of a batch takes
    context : the model's context in words
    batch_size : what fits
    light : leave torch alone
    """

    def __init__(
        self,
        answers: Sequence[Sequence[str]] = (("Hello", " there", "."),),
        fails: BaseException | None = None,
        step_s: float = 0.0,
        context: int | None = 512,
        batch_size: int = 4,
        light: bool = False,
    ) -> None:
        self.light = light
        self.answers, self.fails, self.step_s, self.auto = answers, fails, step_s, batch_size
        self.lm = FakeModel(context_length=context)
        self.calls: list[str] = []
        self.plans: list[dict[str, Any]] = []
        self.models: list[ModelOptions] = []
        self.policies: list[Policy] = []
        self.batches: list[list[list[int]]] = []
        self.seeds: list[int | None] = []
        self.sessions: list[FakeSession] = []
        self.stop_after: int | None = None
        self.remarked: list[str] = []
        self.sizes: tuple[tuple[int, int], ...] | None = None
        self.stops: list[Sequence[str]] = []
        self.published: list[dict[str, Any]] = []

    def plan(self, model: ModelOptions, policy: Policy, **wanted: Any) -> Plan:
        self.calls.append("plan")
        self.models.append(model)
        self.policies.append(policy)
        self.plans.append(wanted)
        if self.fails is not None:
            raise self.fails
        ctx, most = wanted.get("ctx") or 512, wanted.get("batch_size") or self.auto
        sizes = ((ctx, most),) if self.sizes is None else self.sizes
        return Plan(self.lm.context_length, ctx, tuple((tokens, min(size, most)) for tokens, size in sizes), True)

    def sampling(self, options: SamplingOptions) -> Sampling:
        if self.light:
            return cast("Sampling", FakeSampling(options.temperature, options.seed))
        return _sampling(options.temperature, options.top_p, options.top_k, seed=options.seed)

    def remarks(self, lm: FakeModel, asked: SamplingOptions, sampling: Sampling) -> list[str]:
        return list(self.remarked)

    def reader(self, model: ModelOptions, progress: Progress) -> FakeModel:
        return self.lm

    def load(self, model: ModelOptions, progress: Progress) -> FakeModel:
        self.calls.append("load")
        progress(0, 10, "fetching fake")
        return self.lm

    def session(self, lm: FakeModel, policy: Policy, **options: Any) -> FakeSession:
        session = FakeSession(lm, policy, self.answers, **options)
        if self.step_s:
            session.before_token = lambda number: time.sleep(self.step_s)
        self.sessions.append(session)
        return session

    def encode(self, lm: FakeModel, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and prompt[0]["content"] == "no template":
            raise InputError("fake has no chat template")
        text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
        return [sum(word.encode()) for word in text.split()]

    def publish(self, lm: FakeModel, **options: Any) -> None:
        self.published.append(options)

    def generate(self, lm: FakeModel, prompts: list[list[int]], policy: Policy, **options: Any) -> Iterator[TokenEvent]:
        seed = options["sampling"].seed
        self.batches.append(prompts)
        self.seeds.append(seed)
        self.stops.append(options["stop"])
        if self.stop_after is not None and len(self.batches) > self.stop_after:
            raise KeyboardInterrupt
        wanted = [2 + len(ids) % 3 for ids in prompts]
        lengths = [min(length, options["max_new_tokens"]) for length in wanted]
        options["read"](2, 2)
        for step in range(1, max(lengths) + 1):
            time.sleep(self.step_s)
            for index, ids in enumerate(prompts):
                if step <= lengths[index]:
                    end = "stop" if lengths[index] == wanted[index] else "length"
                    reason = end if step == lengths[index] else None
                    yield event(index, f"{sum(ids)}.{seed}.{len(prompts)} ", reason, len(ids), step)


def _sampling(*values: Any, **named: Any) -> Sampling:
    from kcache import Sampling

    return Sampling(*values, **named)
