"""The decode loop: the tokens of ``model.generate``, streamed as text, in batches, with stops and limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from kcache.attaching import attach
from kcache.attention.switching import is_attached
from kcache.cache import KCache
from kcache.decoding.prompts import alike
from kcache.decoding.sampling import Sampler, Sampling
from kcache.decoding.text import Detokenizer
from kcache.errors import ContextLengthError, DoesNotFitError, InputError, KCacheError, PolicyError
from kcache.generation import TokenEvent, generate
from kcache.loading import load, load_config
from kcache.models.loaded import LoadedModel
from kcache.models.names import pull
from kcache.policy import Policy
from kcache.session import Session
from tests.pair import WHOLE
from tests.saved import byte_tokenizer, byte_vocabulary
from tests.tiny_models import make

GREEDY = Sampling(temperature=0)
OFFLOADED = Policy(topn=6, dense_below=0, dense_layers=1, offload="all")
PROMPTS = ["Once upon a time", "The", "In the beginning was the word, and"]


def loaded(kind: str = "llama", **changes: Any) -> LoadedModel:
    model = make(kind, **{"vocab_size": len(byte_vocabulary()), **changes})
    model.generation_config.eos_token_id = 1
    return LoadedModel("tiny", model, byte_tokenizer())


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return loaded()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KCache]:
    """The caches that are made in a test."""
    caches: list[KCache] = []
    original = KCache.__init__

    def keep(self: KCache, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        caches.append(self)

    monkeypatch.setattr(KCache, "__init__", keep)
    return caches


def gathered(events: Iterable[TokenEvent], count: int) -> tuple[list[list[int]], list[str], list[str | None]]:
    """Token ids, text and finish reason per prompt."""
    ids: list[list[int]] = [[] for _ in range(count)]
    texts, reasons = [""] * count, [None] * count
    for event in events:
        assert reasons[event.index] is None, "an event after the last"
        ids[event.index].append(event.token_id)
        texts[event.index] += event.text
        reasons[event.index] = event.finish_reason
        assert event.completion_tokens == len(ids[event.index])
    return ids, texts, reasons


def stock(lm: LoadedModel, prompts: list[str], **options: Any) -> list[list[int]]:
    """New tokens of ``model.generate`` up to and with the end token."""
    batch = lm.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = lm.model.generate(**batch, **{"do_sample": False, "max_new_tokens": 24, **options})
    rows = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        rows.append(row[: row.index(1) + 1] if 1 in row else row)
    return rows


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "ministral"])
@pytest.mark.parametrize("chunk", [4096, 5, 1])
def test_greedy_tokens_are_those_of_generate(kind: str, chunk: int) -> None:
    lm = loaded(kind)
    policy = WHOLE.replace(prefill_chunk=chunk)
    ids, texts, reasons = gathered(generate(lm, PROMPTS, policy, sampling=GREEDY, max_new_tokens=24), 3)
    assert ids == stock(lm, PROMPTS)
    for row, text, reason in zip(ids, texts, reasons, strict=True):
        assert text == lm.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert reason == ("stop" if row[-1] == 1 else "length")
    single = [gathered(generate(lm, p, policy, sampling=GREEDY, max_new_tokens=24), 1)[0][0] for p in PROMPTS]
    assert single == ids


def test_repetition_penalty_as_in_generate(lm: LoadedModel) -> None:
    for prompt in PROMPTS:
        sampling = Sampling(temperature=0, repetition_penalty=1.7)
        ids, _, _ = gathered(generate(lm, prompt, WHOLE, sampling=sampling, max_new_tokens=24), 1)
        assert ids == stock(lm, [prompt], repetition_penalty=1.7)


def test_sampling_is_repeatable_and_follows_its_settings(lm: LoadedModel) -> None:
    def run(**settings: Any) -> list[list[int]]:
        return gathered(generate(lm, PROMPTS, WHOLE, sampling=Sampling(**settings), max_new_tokens=20), 3)[0]

    assert run(temperature=1.0, seed=3) == run(temperature=1.0, seed=3) != run(temperature=1.0, seed=4)
    greedy = run(temperature=0)
    assert run(temperature=1.0, top_k=1, seed=5) == run(temperature=0.7, top_p=1e-6) == greedy
    assert run(temperature=1e-4, seed=1) == greedy
    before = torch.random.get_rng_state()
    run(temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state is left alone"


def test_sampler_draws_from_the_distribution() -> None:
    config = make("llama").generation_config
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    for sampling, probs in (
        (Sampling(temperature=1.0, seed=0), torch.softmax(logits[0], -1)),
        (Sampling(temperature=2.0, seed=0), torch.softmax(logits[0] / 2, -1)),
        (Sampling(temperature=1.0, top_k=2, seed=0), torch.softmax(torch.tensor([2.0, 1, -1e9, -1e9]), -1)),
        (Sampling(temperature=1.0, top_p=0.7, seed=0), torch.softmax(torch.tensor([2.0, 1, -1e9, -1e9]), -1)),
    ):
        sampler = Sampler(sampling, config, torch.device("cpu"))
        picked = sampler.pick(logits, torch.zeros(4000, 1, dtype=torch.long)).bincount(minlength=4) / 4000
        torch.testing.assert_close(picked, probs, atol=0.03, rtol=0)


def test_the_models_own_generation_config_is_the_default() -> None:
    lm = loaded()
    lm.model.generation_config.do_sample = True
    lm.model.generation_config.top_k = 1
    greedy = gathered(generate(lm, PROMPTS, WHOLE, sampling=GREEDY, max_new_tokens=9), 3)[0]
    assert gathered(generate(lm, PROMPTS, WHOLE, max_new_tokens=9), 3)[0] == greedy
    assert not Sampler(Sampling(), lm.model.generation_config, torch.device("cpu")).greedy
    assert Sampler(Sampling(), make("llama").generation_config, torch.device("cpu")).greedy


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 10**400},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"seed": 1.5},
        {"seed": "x"},
    ],
)
def test_nonsense_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Sampling(**settings)


# -- events --------------------------------------------------------------------------------------------------------


def test_events_come_step_by_step_in_prompt_order(lm: LoadedModel) -> None:
    events = list(generate(lm, PROMPTS, WHOLE, sampling=GREEDY, max_new_tokens=6))
    steps = [[e.index for e in group] for _, group in itertools.groupby(events, key=lambda e: e.completion_tokens)]
    assert steps[0] == [0, 1, 2]
    assert all(step == sorted(step) for step in steps)
    assert [e.prompt_tokens for e in events[:3]] == [len(p) for p in PROMPTS]
    times = [e.elapsed_ms for e in events]
    assert times == sorted(times)
    assert {e.ttft_ms for e in events} == {times[0]}
    assert times[0] > 0


def test_all_forms_of_prompt(lm: LoadedModel) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rendered = "<|user|>hi<|end|><|assistant|>"
    ids = lm.tokenizer("hi")["input_ids"]

    def run(prompts: Any) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for event in generate(lm, prompts, WHOLE, sampling=GREEDY, max_new_tokens=5):
            found.setdefault(event.index, []).append(event.token_id)
        return [found[index] for index in sorted(found)]

    assert run("hi") == run(["hi"]) == run(ids) == run([ids]) == run(("hi",))
    assert run(messages) == run([messages]) == run(rendered)
    assert run(["hi", messages, ids]) == [*run("hi"), *run(rendered), *run("hi")]


@pytest.mark.parametrize(
    "prompts",
    ["", [], [""], ["a", ""], [[]], None, float("nan"), [float("nan")], ["a", None], [["a"]], 7, [[1.5]], [[True]],
     [[-1]], [[10**6]], ["a", [3, 10**6]], [{"role": "user"}], "\ud800", {"role": "user", "content": "x"}, b"bytes",
     BatchEncoding({"input_ids": [[5]]})],
)  # fmt: skip
def test_unusable_prompts_are_refused_before_anything_runs(lm: LoadedModel, prompts: Any) -> None:
    with pytest.raises(InputError) as refused:
        generate(lm, prompts, WHOLE)
    assert "\n" not in str(refused.value)


_MISTAKES: dict[str, tuple[Callable[[Any], Any], type[KCacheError], str]] = {
    "a number for a policy": (lambda lm: KCache(lm.model, 128), PolicyError, "policy must be a kcache.Policy"),
    "zero for a policy": (lambda lm: KCache(lm.model, 0), PolicyError, "such as Policy.topn=64.; got int"),
    "a policy of generate": (lambda lm: generate(lm, ["x"], 64), PolicyError, "got int"),
    "a policy of a session": (lambda lm: Session(lm, {}), PolicyError, "got dict"),
    "a model, not loaded": (lambda lm: generate(lm.model, ["x"]), InputError, "lm must be what kcache.load returns"),
    "a session's model": (lambda lm: Session(lm.model), InputError, "got LlamaForCausalLM"),
    "all of a loaded model": (lambda lm: KCache(lm), InputError, "such as lm.model; got LoadedModel"),
    "attaching all of it": (lambda lm: attach(lm).__enter__(), InputError, "such as lm.model; got LoadedModel"),
    "a length in words": (lambda lm: KCache(lm.model, max_length="32k"), InputError, "max_length .* got '32k'"),
    "half a token": (lambda lm: KCache(lm.model, max_length=0.5), InputError, "max_length .* got 0.5"),
    "sampling": (lambda lm: generate(lm, "x", sampling={"temperature": 0}), InputError, "sampling .*; got dict"),
    "no sampling": (lambda lm: Session(lm, sampling={}), InputError, "a kcache.Sampling, such as Sampling"),
    "a cache": (lambda lm: generate(lm, "x", cache=WHOLE), InputError, "cache must be a kcache.KCache; got Policy"),
    "no stop": (lambda lm: generate(lm, "x", stop=None), InputError, "stop must be a string or several; .* NoneType"),
    "a token to stop at": (lambda lm: generate(lm, "x", stop=[5]), InputError, "stop must be .* got int"),
    "a session's stop": (lambda lm: Session(lm).send("x", stop=5), InputError, "stop must be .* got int"),
    "a message": (lambda lm: Session(lm).send(3), InputError, "the message must be a string; got int"),
    "no name": (lambda _: load(None), InputError, "name must be the name or path of a model; got NoneType"),
    "no name of a config": (lambda _: load_config(None), InputError, "got NoneType"),
    "a model for a name": (lambda lm: load(lm.model), InputError, "got LlamaForCausalLM"),
    "nothing to pull": (lambda _: pull(None), InputError, "got NoneType"),
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_things_of_another_kind_are_refused_in_a_sentence(lm: LoadedModel, mistake: str) -> None:
    call, kind, said = _MISTAKES[mistake]
    with pytest.raises(kind, match=said) as refused:
        call(lm)
    assert "\n" not in str(refused.value)


def test_messages_without_a_chat_template() -> None:
    lm = loaded()
    bare = LoadedModel(lm.name, lm.model, byte_tokenizer(chat_template=None))
    with pytest.raises(InputError, match="no chat template"):
        generate(bare, [{"role": "user", "content": "hi"}], WHOLE)
    assert len(list(generate(bare, "hi", WHOLE, sampling=GREEDY, max_new_tokens=3))) >= 1


def test_lengths_and_the_models_context() -> None:
    lm = loaded(max_position_embeddings=32)
    lm.model.generation_config.eos_token_id = None
    lm = LoadedModel(lm.name, lm.model, byte_tokenizer())
    for bad in (0, -3, 1.5, "many"):
        with pytest.raises(InputError, match="max_new_tokens"):
            generate(lm, "hi", WHOLE, max_new_tokens=bad)  # type: ignore[arg-type]
    with pytest.raises(ContextLengthError, match=r"40 tokens .* 32"):
        generate(lm, "x" * 40, WHOLE)
    with pytest.raises(ContextLengthError):
        generate(lm, ["a", "x" * 32], WHOLE)
    ids, _, reasons = gathered(generate(lm, "x" * 30, WHOLE, sampling=GREEDY, max_new_tokens=50), 1)
    assert len(ids[0]) <= 2
    assert reasons in (["length"], ["stop"])
    over = list(generate(lm, "x" * 40, WHOLE, sampling=GREEDY, max_new_tokens=3, allow_overflow=True))
    assert over[-1].finish_reason is not None


# -- text ----------------------------------------------------------------------------------------------------------


def test_stop_strings_end_a_sequence_and_are_cut(lm: LoadedModel) -> None:
    _, whole, _ = gathered(generate(lm, PROMPTS, WHOLE, sampling=GREEDY, max_new_tokens=24), 3)
    stop = whole[0][4:7]
    for stops in ([stop], [stop, "never"], ["", stop], stop):
        _, texts, reasons = gathered(generate(lm, PROMPTS, WHOLE, sampling=GREEDY, max_new_tokens=24, stop=stops), 3)
        assert texts[0] == whole[0][: whole[0].index(stop)]
        assert reasons[0] == "stop"
        for text, other in zip(texts[1:], whole[1:], strict=True):
            assert text == other.split(stop)[0]


def test_a_stop_string_at_the_very_end_and_half_of_one(lm: LoadedModel) -> None:
    _, (whole,), _ = gathered(generate(lm, "ab", WHOLE, sampling=GREEDY, max_new_tokens=8), 1)
    _, (text,), (reason,) = gathered(
        generate(lm, "ab", WHOLE, sampling=GREEDY, max_new_tokens=8, stop=[whole[-1] + "never said"]), 1
    )
    assert text == whole
    assert reason == "length"


texts = st.lists(st.integers(5, len(byte_vocabulary()) - 1) | st.just(1), max_size=30)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.text(max_size=12).flatmap(
        lambda text: st.tuples(
            st.just(text), st.lists(st.sampled_from(["a", "ab", "é", "\n", "xyz", "日本"]), max_size=2)
        )
    ),
    texts,
)
def test_detokenizer_pieces_add_up(text_and_stop: tuple[str, list[str]], noise: list[int]) -> None:
    """Whole characters only, never part of a stop string, and in sum what the tokens say up to it."""
    text, stop = text_and_stop
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text)["input_ids"], *noise]
    want = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    ends = [want.index(s) for s in stop if s in want]
    got = "".join(pieces)
    if detokenizer.stopped:
        assert ends
        assert want.startswith(got)
        assert not any(s in got for s in stop)
        assert got == want[: min(ends)] or "\ufffd" in want
    else:
        assert got == want
        assert not ends


# -- caches --------------------------------------------------------------------------------------------------------


def test_going_on_with_a_cache(lm: LoadedModel) -> None:
    """The next prompt begins with the last token, which the cache does not hold yet."""
    policy = WHOLE.replace(prefill_chunk=7)
    cache = KCache(lm.model, policy)
    first, _, _ = gathered(generate(lm, "Once upon", sampling=GREEDY, max_new_tokens=5, cache=cache), 1)
    assert cache.get_seq_length() == 9 + len(first[0]) - 1
    more = lm.tokenizer(" and then")["input_ids"]
    second, _, _ = gathered(generate(lm, [first[0][-1], *more], sampling=GREEDY, max_new_tokens=5, cache=cache), 1)
    whole = [*lm.tokenizer("Once upon")["input_ids"], *first[0], *more]
    assert second == gathered(generate(lm, whole, policy, sampling=GREEDY, max_new_tokens=5), 1)[0]
    with pytest.raises(InputError, match="another policy"):
        generate(lm, "x", Policy(topn=3), cache=cache)


def test_going_on_with_a_batch_whose_sequences_ended_apart(lm: LoadedModel) -> None:
    """What a sequence that has ended is fed meanwhile is not part of its context."""
    prompts = ["Once upon a time", "ab", "The quick"]
    plain = gathered(generate(lm, prompts, WHOLE, sampling=GREEDY, max_new_tokens=14), 3)[1]
    stop = [plain[1][2:4]]
    cache = KCache(lm.model, WHOLE)
    first, _, reasons = gathered(generate(lm, prompts, sampling=GREEDY, max_new_tokens=14, stop=stop, cache=cache), 3)
    lengths = {len(row) for row in first}
    assert len(lengths) > 1, "the sequences were meant to end apart"
    assert "stop" in reasons
    more = [lm.tokenizer(text)["input_ids"] for text in (" x", " and more", "")]
    follow = [[row[-1], *ids] for row, ids in zip(first, more, strict=True)]
    second, _, _ = gathered(generate(lm, follow, sampling=GREEDY, max_new_tokens=6, cache=cache), 3)
    for prompt, row, ids, got in zip(prompts, first, more, second, strict=True):
        whole = [*lm.tokenizer(prompt)["input_ids"], *row, *ids]
        assert gathered(generate(lm, whole, WHOLE, sampling=GREEDY, max_new_tokens=6), 1)[0] == [got]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "ministral"])
@pytest.mark.parametrize(
    "policy",
    [Policy(), OFFLOADED, OFFLOADED.replace(spread="even", tail="none"), OFFLOADED.replace(k_bits=8, v_bits=8)],
    ids=["dense", "need", "even", "8 bits"],
)
def test_sequences_that_have_ended_leave_the_batch(kind: str, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' tokens are those of a batch where nobody leaves, and each step is of those alone."""
    lm = loaded(kind)
    prompts = [*PROMPTS, "ab", "xyz and so", "a quick brown fox jumps over it"]
    sizes: list[int] = []
    forward = lm.model.forward
    plain, texts, _ = gathered(generate(lm, prompts, policy, sampling=GREEDY, max_new_tokens=60), 6)
    ends = [text[at : at + 2] for text, at in zip(texts, (4, 9, 20, 33, 40, 55), strict=True) if len(text) > at + 2]

    def counted(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", counted)
    runs = []
    for move in ((1 / 8, 1), (2, 1)):
        sizes.clear()
        monkeypatch.setattr("kcache.generation._MOVE", move)
        runs.append(gathered(generate(lm, prompts, policy, sampling=GREEDY, max_new_tokens=60, stop=ends), 6))
        assert (len(set(sizes)) > 2) == (move[0] < 1), sizes
    assert runs[0] == runs[1]
    assert len({len(row) for row in runs[0][0]}) > 2, "the sequences were meant to end apart"
    assert runs[0][0] != plain


BEGINNING = "Once upon a time there was a "


@pytest.mark.parametrize("ends", [["b", "king and", "old", "", "hen, a"], ["bq", "ki", "ol", "  "]], ids=["", "even"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "qwen3"])
def test_what_prompts_begin_with_is_read_once(kind: str, ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 12 tokens: the tokens are those of prompts read alone, and the beginning is read for one."""
    monkeypatch.setattr("kcache.decoding.prefix.LEAST_SHARED", 8)
    lm = loaded(kind)
    prompts = [BEGINNING + end for end in ends]
    shapes: list[tuple[int, ...]] = []
    forward = lm.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", counted)
    sliding = kind == "gemma3"
    for policy in (Policy(), WHOLE, OFFLOADED.replace(spread="even", tail="none"), Policy(offload="none")):
        policy = policy.replace(prefill_chunk=12)
        list(generate(lm, "x", policy, max_new_tokens=1))  # what is tried once per model has been
        shapes.clear()
        told: list[tuple[int, int]] = []
        many = gathered(
            generate(lm, prompts, policy, sampling=GREEDY, max_new_tokens=12,
                     read=lambda done, total, told=told: told.append((done, total))),
            len(prompts),
        )  # fmt: skip
        width = max(len(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts)
        if sliding and len(set(map(len, ends))) > 1:  # a window has no mask for the padding between
            assert shapes[0][0] == len(prompts)
        else:
            assert [shape[0] for shape in shapes if shape[1] > 1][:3] == [1, 1, 1]
            assert sum(shape[1] for shape in shapes if shape[0] == 1 and shape[1] > 1) >= len(BEGINNING) - 2
        assert told == sorted(told)
        assert told[-1] == (width, width)
        for index, prompt in enumerate(prompts):
            alone = gathered(generate(lm, prompt, policy, sampling=GREEDY, max_new_tokens=12), 1)
            assert [part[index] for part in many] == [part[0] for part in alone]


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_how_far_prompts_are_alike(one: list[int], other: list[int]) -> None:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    assert alike(one, other) == len(list(pairs))


def test_a_penalty_counts_what_was_read_once(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.decoding.prefix.LEAST_SHARED", 8)
    sampling = Sampling(temperature=0, repetition_penalty=1.7)
    prompts = [BEGINNING + "b", BEGINNING + "king and"]
    many = gathered(generate(lm, prompts, WHOLE, sampling=sampling, max_new_tokens=12), 2)[0]
    alone = [gathered(generate(lm, prompt, WHOLE, sampling=sampling, max_new_tokens=12), 1)[0][0] for prompt in prompts]
    assert many == alone


def test_memory_is_planned_for_all_while_one_is_read(
    lm: LoadedModel, made: list[KCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V of as many layers stays as fits the whole batch, and what does not fit it is refused before it is read."""
    prompts = [BEGINNING + end for end in ("bq", "ki", "ol", "  ")]
    token_bytes = 2 * 8 * 2 * 4 * 3  # KV heads, head size, K and V, fp32, layers
    full = len(prompts) * (len(BEGINNING) + 14) * token_bytes
    for budget, refused in ((full * 3 // 4, False), (full // 4, True)):
        policy = Policy(topn=6, dense_below=0, dense_layers=0, kv_budget=budget, tail="none", spread="even", hot_rows=0)
        kinds = []
        for least in (8, 10**9):
            monkeypatch.setattr("kcache.decoding.prefix.LEAST_SHARED", least)
            events = generate(lm, prompts, policy, sampling=GREEDY, max_new_tokens=12)
            if refused:
                with pytest.raises(DoesNotFitError):
                    next(events)
                continue
            list(events)
            kinds.append([layer.kind for layer in made[-1].tiered_layers])
            assert made[-1].stats.device_bytes <= budget
        assert refused or (kinds[0] == kinds[1] and len(set(kinds[0])) == 2), kinds


def test_sampled_tokens_and_penalties_of_those_that_stay(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty reads the tokens of each sequence so far, which move up with it."""
    monkeypatch.setattr("kcache.generation._MOVE", (1 / 8, 1))
    sampling = Sampling(temperature=0, repetition_penalty=1.7)
    prompts = [*PROMPTS, "ab"]
    texts = gathered(generate(lm, prompts, WHOLE, sampling=sampling, max_new_tokens=30), 4)[1]
    stop = [texts[0][3:5], texts[3][6:9]]
    got = gathered(generate(lm, prompts, WHOLE, sampling=sampling, max_new_tokens=30, stop=stop), 4)[0]
    assert len({len(row) for row in got}) > 1
    monkeypatch.setattr("kcache.generation._MOVE", (2, 1))
    assert got == gathered(generate(lm, prompts, WHOLE, sampling=sampling, max_new_tokens=30, stop=stop), 4)[0]


def test_a_cache_of_another_batch_or_model_is_refused(lm: LoadedModel) -> None:
    cache = KCache(lm.model, WHOLE)
    list(generate(lm, ["a long one", "b"], sampling=GREEDY, max_new_tokens=2, cache=cache))
    for prompts in ("one", ["a", "b", "c"]):
        with pytest.raises(KCacheError, match="2 sequences"):
            list(generate(lm, prompts, sampling=GREEDY, max_new_tokens=2, cache=cache))
    other = loaded(seed=1)
    with pytest.raises(KCacheError, match="another model"):
        list(generate(other, ["a", "b"], sampling=GREEDY, max_new_tokens=2, cache=cache))


def test_memory_is_allocated_for_prompt_and_answer_at_once(lm: LoadedModel, made: list[KCache]) -> None:
    list(generate(lm, PROMPTS, WHOLE, sampling=GREEDY, max_new_tokens=20))
    rows = max(len(p) for p in PROMPTS) + 20
    assert made[0].stats.host_bytes == rows * 3 * 2 * 8 * 4 * 3


# -- streams -------------------------------------------------------------------------------------------------------


def test_two_streams_on_one_model_do_not_disturb_each_other(lm: LoadedModel) -> None:
    """TopN far below the context: were one of them answered by stock attention, its tokens would differ."""
    policy = Policy(topn=2, dense_below=0, dense_layers=0, resident_layers=0)
    texts = [PROMPTS[2] * 2, PROMPTS[0] * 3]
    alone = [
        gathered(generate(lm, t, policy, sampling=GREEDY, max_new_tokens=12 - 5 * n), 1)[0] for n, t in enumerate(texts)
    ]
    streams = [generate(lm, t, policy, sampling=GREEDY, max_new_tokens=12 - 5 * n) for n, t in enumerate(texts)]
    together: list[list[int]] = [[], []]
    for pair in itertools.zip_longest(*[streams[1], streams[0]]):
        for number, event in zip((1, 0), pair, strict=True):
            if event is not None:
                together[number].append(event.token_id)
    assert [[row] for row in together] == alone
    assert not is_attached(lm.model)


def test_a_stream_that_is_left_detaches_the_model(lm: LoadedModel) -> None:
    events = generate(lm, "Once", WHOLE, sampling=GREEDY)
    assert not is_attached(lm.model), "nothing happens before the first event is asked for"
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert not is_attached(lm.model)


@pytest.mark.parametrize(("tokens", "compiles"), [(1023, False), (1024, True)])
def test_steps_after_a_long_prompt_are_compiled_before_the_first_token(
    lm: LoadedModel, monkeypatch: pytest.MonkeyPatch, tokens: int, compiles: bool
) -> None:
    pytest.importorskip("numba")
    done: list[str] = []
    monkeypatch.setattr("kcache.backends.jit.steps.compiled", lambda name, dtype: done.append(name))
    events = generate(lm, [[5] * tokens], sampling=GREEDY, max_new_tokens=1, allow_overflow=True)
    next(iter(events))
    assert done == (["decode", "dense"] if compiles else [])
