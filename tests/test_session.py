"""A conversation: the kept cache saves work and changes nothing that is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from kcache.attention.switching import is_attached
from kcache.cache import KCache
from kcache.decoding.sampling import Sampling
from kcache.errors import ContextLengthError, DoesNotFitError, InputError
from kcache.generation import TokenEvent
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from kcache.session import Session
from tests.pair import WHOLE
from tests.saved import byte_tokenizer, byte_vocabulary
from tests.tiny_models import make

GREEDY = Sampling(temperature=0)
QUESTIONS = ["hello", "what is it?", "and then?", "why"]


def loaded(kind: str = "llama", chat_template: bool = True, **changes: Any) -> LoadedModel:
    model = make(kind, **{"vocab_size": len(byte_vocabulary()), **changes})
    tokenizer = byte_tokenizer() if chat_template else byte_tokenizer(chat_template=None)
    return LoadedModel("tiny", model, tokenizer)


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return loaded()


def said(events: Iterable[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def anew(session: Session, text: str, **options: Any) -> tuple[str, Session]:
    """The answer of a session that has to prefill the whole conversation."""
    fresh = Session(session.lm, session.policy, system=session.system, sampling=session.sampling)
    fresh.load_messages(session.messages)
    return said(fresh.send(text, **options)), fresh


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "ministral"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0, repetition_penalty=1.5)])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_kept_cache_answers_like_a_new_one(kind: str, sampling: Sampling, system: str | None) -> None:
    session = Session(loaded(kind), WHOLE, system=system, sampling=sampling)
    for question in QUESTIONS:
        want, _ = anew(session, question, max_new_tokens=12)
        assert said(session.send(question, max_new_tokens=12)) == want
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 4
    assert session.cache is not None
    assert session.cache.stats.rows_fetched > 0
    assert not is_attached(session.lm.model)


def test_later_turns_prefill_only_what_is_new(lm: LoadedModel) -> None:
    session = Session(lm, WHOLE, system="x" * 200, sampling=GREEDY)
    said(session.send("hello", max_new_tokens=6))
    first = session.last_turn
    cache = session.cache
    assert first is not None
    assert first.new_prompt_tokens == first.prompt_tokens > 200
    said(session.send("more", max_new_tokens=6))
    second = session.last_turn
    assert second is not None
    assert session.cache is cache
    assert second.prompt_tokens > first.prompt_tokens
    assert second.new_prompt_tokens < 60
    assert second.completion_tokens <= 6
    assert second.ttft_ms > 0
    assert session.prompt_tokens("more") > second.prompt_tokens


def test_last_turn_figures(lm: LoadedModel) -> None:
    policy = Policy(topn=4, spread="even", dense_below=0, dense_layers=0, resident_layers=0)
    session = Session(lm, policy, sampling=GREEDY)
    assert session.last_turn is None
    events = list(session.send("hello there", max_new_tokens=9))
    turn = session.last_turn
    assert turn is not None
    assert turn.completion_tokens == len(events)
    assert turn.prompt_tokens == events[0].prompt_tokens
    assert turn.tok_s > 0
    assert turn.link_bytes_per_token == 3 * 2 * 4 * 8 * 4  # layers, KV heads, rows, values a row, bytes a value


@pytest.mark.parametrize("how", ["close", "break", "interrupt"])
def test_a_reply_cut_short_is_kept(lm: LoadedModel, how: str) -> None:
    session = Session(lm, WHOLE, sampling=GREEDY)
    whole, _ = anew(session, "hello", max_new_tokens=20)
    events = session.send("hello", max_new_tokens=20)
    pieces = [next(events).text for _ in range(6)]
    if how == "interrupt":
        session.interrupt()
        rest = list(events)
        assert rest == []
    elif how == "close":
        events.close()  # type: ignore[attr-defined]
    else:
        del events
    assert session.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    assert whole.startswith("".join(pieces))
    assert not is_attached(lm.model)
    want, _ = anew(session, "go on", max_new_tokens=10)
    assert said(session.send("go on", max_new_tokens=10)) == want


def test_interrupt_during_the_prompt(lm: LoadedModel) -> None:
    """Nothing was said: the question is taken back, and can be asked again."""
    session = Session(lm, WHOLE.replace(prefill_chunk=4), sampling=GREEDY)
    seen = 0
    original = lm.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 3:
            session.interrupt()
        return original(*args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    lm.model.forward = forward  # type: ignore[method-assign]
    try:
        assert list(session.send("a rather long question", max_new_tokens=5)) == []
    finally:
        del lm.model.forward
    assert session.messages == []
    assert session.last_turn is None
    want, _ = anew(session, "hello", max_new_tokens=5)
    assert said(session.send("hello", max_new_tokens=5)) == want


def test_a_second_send_ends_a_reply_left_open(lm: LoadedModel) -> None:
    session = Session(lm, WHOLE, sampling=GREEDY)
    first = session.send("hello", max_new_tokens=20)
    begun = "".join(next(first).text for _ in range(4))
    second = said(session.send("and?", max_new_tokens=8))
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]
    assert session.messages[1]["content"] == begun
    assert session.messages[3]["content"] == second
    assert list(first) == []
    fresh = Session(lm, WHOLE, sampling=GREEDY)
    fresh.load_messages(session.messages[:2])
    assert said(fresh.send("and?", max_new_tokens=8)) == second


def test_an_error_in_the_middle_drops_the_cache_and_keeps_what_was_said(lm: LoadedModel) -> None:
    session = Session(lm, WHOLE, sampling=GREEDY)
    events = session.send("hello", max_new_tokens=20)
    pieces = [next(events).text for _ in range(3)]
    original = lm.model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    broken.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    lm.model.forward = broken  # type: ignore[method-assign]
    try:
        with pytest.raises(ZeroDivisionError):
            next(events)
        assert session.messages[-1]["content"] == "".join(pieces)
        with pytest.raises(ZeroDivisionError):
            list(session.send("again"))
    finally:
        del lm.model.forward
    assert len(session.messages) == 2
    assert not is_attached(lm.model)
    want, _ = anew(session, "more", max_new_tokens=5)
    assert said(session.send("more", max_new_tokens=5)) == want


def test_changes_between_turns(lm: LoadedModel) -> None:
    session = Session(lm, WHOLE, sampling=GREEDY)
    said(session.send("hello", max_new_tokens=6))
    before = session.cache
    session.policy = WHOLE.replace(topn=999)  # a step that leaves rows out differs from a prompt
    want, _ = anew(session, "one", max_new_tokens=6)
    assert said(session.send("one", max_new_tokens=6)) == want
    assert session.cache is not before
    assert session.cache is not None
    assert session.cache.policy.topn == 999
    session.sampling = Sampling(temperature=1.0, seed=8)
    want, _ = anew(session, "two", max_new_tokens=6)
    assert said(session.send("two", max_new_tokens=6)) == want
    session.system = "be good"
    assert session.cache is None
    want, _ = anew(session, "three", max_new_tokens=6)
    assert said(session.send("three", max_new_tokens=6)) == want
    assert session.system == "be good"
    session.clear()
    assert session.messages == []
    assert session.cache is None
    assert session.last_turn is None
    want, _ = anew(session, "four", max_new_tokens=6)
    assert said(session.send("four", max_new_tokens=6)) == want


@pytest.mark.parametrize("change", [KCache.reset, lambda cache: cache.crop(-5)])
def test_a_cache_that_somebody_else_has_changed_is_made_anew(lm: LoadedModel, change: Callable[[KCache], None]) -> None:
    """Its memory given back between turns, say."""
    session = Session(lm, WHOLE, sampling=GREEDY)
    said(session.send("hello", max_new_tokens=6))
    assert session.cache is not None
    change(session.cache)
    want, _ = anew(session, "and then?", max_new_tokens=12)
    assert said(session.send("and then?", max_new_tokens=12)) == want


def test_messages_are_loaded_and_copied(lm: LoadedModel) -> None:
    session = Session(lm, WHOLE, sampling=GREEDY)
    given = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    session.load_messages(given)
    assert session.system == "s"
    assert session.messages == given[1:]
    said(session.send("x", max_new_tokens=2))
    assert len(given) == 3
    for bad in ([{"role": "user"}], [{"role": "user", "content": 3}], [{"content": "x"}]):
        with pytest.raises(InputError, match="message 1"):
            session.load_messages(bad)  # type: ignore[arg-type]
    assert session.messages[:2] == given[1:], "a bad list changes nothing"


def test_what_is_refused(lm: LoadedModel) -> None:
    session = Session(lm, WHOLE, sampling=GREEDY)
    for empty in ("", "  \n"):
        with pytest.raises(InputError, match="empty"):
            session.send(empty)
    with pytest.raises(InputError, match="max_new_tokens"):
        session.send("x", max_new_tokens=0)
    with pytest.raises(InputError, match="surrogate"):
        session.send("\udfff")
    with pytest.raises(InputError, match="no chat template"):
        Session(loaded(chat_template=False), WHOLE).send("x")
    assert session.messages == []
    short = Session(loaded(max_position_embeddings=64), WHOLE, sampling=GREEDY)
    with pytest.raises(ContextLengthError, match="64"):
        short.send("x" * 100)
    said(short.send("hi", max_new_tokens=500))
    assert short.last_turn is not None
    assert short.last_turn.prompt_tokens + short.last_turn.completion_tokens <= 64
    long = Session(loaded(max_position_embeddings=64), WHOLE, sampling=GREEDY, allow_overflow=True)
    assert said(long.send("x" * 100, max_new_tokens=2)) is not None
    tight = Session(lm, WHOLE.replace(kv_budget="1KiB"), sampling=GREEDY)
    with pytest.raises(DoesNotFitError):
        list(tight.send("hello"))
    assert tight.messages == []


def test_stop_strings_and_known_length(lm: LoadedModel) -> None:
    session = Session(lm, WHOLE, sampling=GREEDY, max_length=300)
    whole, _ = anew(session, "hello", max_new_tokens=20)
    stop = whole[3:5]
    assert said(session.send("hello", max_new_tokens=20, stop=[stop])) == whole[: whole.index(stop)]
    assert session.cache is not None
    assert session.cache.stats.host_bytes == 300 * 3 * 2 * 8 * 4
    want, _ = anew(session, "next", max_new_tokens=6)
    assert said(session.send("next", max_new_tokens=6)) == want
    assert (
        said(Session(lm, WHOLE, sampling=GREEDY).send("hello", max_new_tokens=20, stop=stop))
        == whole[: whole.index(stop)]
    )
