"""Haystacks, what is hidden in them, and the rows of retrieval cases."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from kcache.bench.context import reference_prose
from kcache.errors import ContextLengthError, InputError
from kcache.evaluate.aggregation import COMMON, COMMON_TIMES, HOPS, OTHER_TIMES, common_words, variable_tracking
from kcache.evaluate.haystack import Prose, count_tokens, passage, split_prompt, spread
from kcache.evaluate.needle import KEYS, multikey, passkey
from kcache.evaluate.retrieval import KINDS, Spec, check_lengths, make_problem, run_cases, score
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from tests.bench.machines import tiny
from tests.saved import byte_tokenizer

STORY = Prose("story", " ".join(f"Sentence {number} tells of a quiet morning." for number in range(50)))
REFERENCE = Prose("reference", reference_prose())


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return tiny()


@pytest.fixture(scope="module")
def plain(lm: LoadedModel) -> LoadedModel:
    """The model without a chat template."""
    return LoadedModel("plain", lm.model, byte_tokenizer(None))


# -- haystacks -----------------------------------------------------------------------------------------------------


def test_sentences_are_the_text() -> None:
    text = "One. Two!\n\nA title\n\nThree? " + "x" * 1000 + " end."
    pieces = Prose("t", text).sentences
    assert "".join(pieces) == text
    assert pieces[:4] == ("One. ", "Two!\n\n", "A title\n\n", "Three? ")
    assert max(map(len, pieces)) <= 402


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_needle_stands_at_its_depth(lm: LoadedModel, depth: float) -> None:
    text = passage(lm, STORY, 1500, 0.3, [(depth, "HERE IT IS.")])
    assert 1400 < count_tokens(lm, text) <= 1500
    before, _, after = text.partition("HERE IT IS.\n")
    assert abs(len(before) / (len(before) + len(after)) - depth) < 0.03
    assert (before == "", after == "") == (depth == 0, False) if depth < 1 else after == ""


def test_a_passage_is_prose_from_where_it_was_asked_to_begin(lm: LoadedModel) -> None:
    first, second = passage(lm, STORY, 300, 0.0), passage(lm, STORY, 300, 0.5)
    assert first.startswith("Sentence 0 ") and second.startswith("Sentence 25 ")
    assert first in STORY.text and second in STORY.text
    assert passage(lm, STORY, 5000, 0.0).count("Sentence 0 ") == 3, "a short text begins anew"


def test_hidden_sentences_keep_their_order(lm: LoadedModel) -> None:
    text = passage(lm, STORY, 800, 0.0, [(0.9, "Third."), (0.1, "First."), (0.1, "Second.")])
    assert re.findall("First|Second|Third", text) == ["First", "Second", "Third"]


@pytest.mark.parametrize(("prose", "tokens"), [(Prose("empty", " \n"), 100), (STORY, 20)])
def test_no_room_and_no_text_are_said(lm: LoadedModel, prose: Prose, tokens: int) -> None:
    with pytest.raises(InputError, match=r"no text|there is no room"):
        passage(lm, prose, tokens, 0.0, [(0.5, "A needle.")])


def test_a_prompt_is_cut_at_the_question(lm: LoadedModel, plain: LoadedModel) -> None:
    head, tail = split_prompt(lm, "Some text.", "Which?", " It is")
    assert lm.tokenizer.decode(head) == "<|user|>Some text.\n\n"
    assert lm.tokenizer.decode(tail) == "Which?<|end|><|assistant|> It is"
    message = [{"role": "user", "content": "Some text.\n\nWhich?"}]
    whole: Any = lm.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    assert head + tail == whole["input_ids"] + lm.tokenizer(" It is")["input_ids"]
    head, tail = split_prompt(plain, "Some text.", "Which?", " It is")
    assert plain.tokenizer.decode(head + tail) == "Some text.\n\nQuestion: Which?\nAnswer: It is"


def test_a_template_that_rewrites_the_question_is_refused(lm: LoadedModel) -> None:
    shouting = LoadedModel("x", lm.model, byte_tokenizer("{{ messages[0]['content'] | upper }}"))
    with pytest.raises(InputError, match="cannot be cut"):
        split_prompt(shouting, "Some text.", "Which?")


# -- what is hidden ------------------------------------------------------------------------------------------------


def test_passkey(lm: LoadedModel) -> None:
    problem = passkey(lm, STORY, 600, 0.5, "a")
    (key,) = problem.answers
    assert problem.context.count(key) == 2 and key not in problem.question + problem.lead
    assert problem == passkey(lm, STORY, 600, 0.5, "a") != passkey(lm, STORY, 600, 0.5, "b")


def test_multikey_asks_for_the_one_at_the_depth(lm: LoadedModel) -> None:
    problem = multikey(lm, STORY, 1500, 1.0, "a")
    facts = re.findall(r"The access code of (the \w+ \w+) is (\d{5})\.", problem.context)
    assert len(facts) == len(dict(facts)) == KEYS and len({code for _, code in facts}) == KEYS
    name, code = facts[-1]
    assert (code,) == problem.answers and name in problem.question and problem.lead.endswith(f"{name} is")


def test_common_words_are_the_most_frequent_and_fill_the_length(lm: LoadedModel) -> None:
    problem = common_words(lm, REFERENCE, 6000, "a")
    listed = re.findall(r"\d+\. (\w+)", problem.context)
    counts = Counter(listed)
    assert {word for word, _ in counts.most_common(COMMON)} == set(problem.answers)
    assert sorted(set(counts.values())) == [OTHER_TIMES, COMMON_TIMES]
    assert 5900 < count_tokens(lm, problem.context) <= 6000
    assert len(counts) > 2 * COMMON
    for tokens, prose in ((1000, REFERENCE), (6000, STORY)):
        with pytest.raises(InputError, match="common-words"):
            common_words(lm, prose, tokens, "a")


def test_variables_resolve_to_the_value(lm: LoadedModel) -> None:
    problem = variable_tracking(lm, STORY, 1500, "a")
    values: dict[str, str] = {}
    for name, kind, value in re.findall(r"VAR ([A-Z]{5}) = (VAR )?(\w+)\.\n", problem.context):
        values[name] = values[value] if kind else value
    assert len(values) == len(set(problem.answers)) == HOPS + 1
    assert set(values) == set(problem.answers)
    (value,) = set(values.values())
    assert value in problem.question


def test_depths_are_spread() -> None:
    assert spread(4, [0.0, 0.5, 0.0, 1.0]) == [0.0, 0.375, 0.5, 1.0]


@pytest.mark.parametrize(
    ("reply", "share"),
    [("The key is 12345.", 0.5), ("12345, red", 1.0), ("123456 redder", 0.0), ("", 0.0), ("**Red** x12345", 0.0)],
)
def test_an_answer_counts_as_a_whole_word(reply: str, share: float) -> None:
    assert score(reply, ("12345", "red")) == share


# -- rows ----------------------------------------------------------------------------------------------------------

SPEC = Spec(
    STORY,
    kinds=("passkey", "variable-tracking"),
    ctxs=(900, 500),
    depths=(0.0, 1.0),
    topns=(4, 4096),
    policy=Policy.paper(dense_layers=1, offload="all"),
)


def test_cases_are_every_kind_length_and_depth() -> None:
    cases = [(case.kind, case.ctx, case.depth) for case in SPEC.cases]
    assert cases == [
        ("passkey", 500, 0.0), ("passkey", 500, 1.0), ("variable-tracking", 500, None),
        ("passkey", 900, 0.0), ("passkey", 900, 1.0), ("variable-tracking", 900, None),
    ]  # fmt: skip
    twice = Spec(STORY, samples=2)
    assert len(twice.cases) == len(set(twice.cases)) == 2 * 3 * 5 * 2


def test_a_case_gives_a_row_for_each_contender(lm: LoadedModel) -> None:
    said: list[str] = []
    found = list(run_cases(lm, SPEC, SPEC.cases[1:3], said.append, {"here": 1}))
    assert [[(row.engine, row.topn) for row in rows] for rows in found] == [
        [("dense", None), ("kcache", 4), ("kcache", 4096)]
    ] * 2
    for case, (dense, few, every) in zip(SPEC.cases[1:3], found, strict=True):
        problem = make_problem(lm, SPEC, case)
        assert dense.answers == list(problem.answers) and dense.env == {"here": 1}
        assert 450 < dense.prompt_tokens < 700 and dense.question_tokens > 20
        assert (every.reply, every.same_reply, every.score) == (dense.reply, True, dense.score)
        assert dense.rows_fetched == 0 and dense.policy is None
        assert few.rows_fetched % (4 * 2 * 4) == 0 and few.rows_fetched >= dense.question_tokens * 4 * 2 * 4
        assert few.same_reply == (few.reply == dense.reply)
        assert few.policy is not None and few.policy["topn"] == 4
    assert said[0].startswith("1 of 2 · ") and said[4].startswith("2 of 2 · ")
    assert said[0].endswith("prefill") and said[1].endswith("dense") and said[3].endswith("N=4096")


def test_what_does_not_fit_the_context_is_said(lm: LoadedModel) -> None:
    spec = Spec(STORY, kinds=("passkey",), ctxs=(2048,), depths=(0.5,))
    with pytest.raises(ContextLengthError, match="ask for a shorter haystack"):
        check_lengths(lm, spec, spec.cases)
    check_lengths(lm, SPEC, SPEC.cases)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"kinds": ("pass",)}, "no retrieval task 'pass'; there are passkey"), ({"depths": (1.5,)}, "depth")],
)
def test_a_spec_checks_itself(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Spec(STORY, **changes)
    assert len(KINDS) == 4
