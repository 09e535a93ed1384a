"""Answering questions: prefixes shared, answers kept, scores summed up, data found in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kcache.evaluate.questions as questions_module
from kcache.errors import InputError
from kcache.evaluate.agreement import judged, summarise
from kcache.evaluate.forks import Prefix, contenders
from kcache.evaluate.localdata import local_tasks, stock_name, task_folders
from kcache.evaluate.questions import Answerer, Part, Question, common_prefix, row_key
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from tests.bench.machines import tiny
from tests.tiny_models import tokens

POLICY = Policy.paper(dense_layers=1, offload="all")
SHOTS = tokens(1, 30).tolist()


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return tiny()


def written(doc: int, task: str = "sums", most: int = 6) -> Question:
    return Question(task, doc, (Part((*SHOTS, *tokens(10 + doc, 8).tolist())),), most)


def scored(doc: int, choices: int = 2) -> Question:
    prompt = (*SHOTS, *tokens(20 + doc, 5).tolist())
    parts = [Part(prompt, tuple(tokens(30 + choice, 1 + choice).tolist())) for choice in range(choices)]
    return Question("choices", doc, tuple(parts))


# -- answering -----------------------------------------------------------------------------------------------------


def test_replies_of_every_contender(lm: LoadedModel) -> None:
    kept: list[Any] = []
    answerer = Answerer(lm, contenders(POLICY, (4, 4096)), keep=kept.append, env={"here": 1})
    found = answerer.answer([written(0), written(1)])
    assert kept == found and answerer.skipped == 0
    for rows, question in zip(found, (written(0), written(1)), strict=True):
        dense, few, every = rows
        (part,) = question.parts
        wanted: Any = lm.model.generate(torch.tensor([part.prompt]), max_new_tokens=6, do_sample=False)
        assert dense["reply"] == lm.tokenizer.decode(wanted[0, len(part.prompt) :]) == every["reply"]
        assert (dense["rows_fetched"], dense["topn"], dense["policy"]) == (0, None, None)
        assert few["rows_fetched"] == 5 * 2 * 4 * 4
        assert (few["prompt_tokens"], few["env"], few["scores"]) == (38, {"here": 1}, {})


def test_continuations_are_scored_by_decode_steps(lm: LoadedModel) -> None:
    (rows,) = Answerer(lm, contenders(POLICY, (4, 4096))).answer([scored(0)])
    dense, few, every = rows
    for part, total in zip(scored(0).parts, dense["log_likelihoods"], strict=True):
        assert part.continuation is not None
        ids = [*part.prompt, *part.continuation]
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids])).logits[0, len(part.prompt) - 1 : -1].log_softmax(-1)
        assert total == pytest.approx(float(logits.gather(1, torch.tensor(part.continuation)[:, None]).sum()), abs=1e-3)
    assert every["log_likelihoods"] == pytest.approx(dense["log_likelihoods"], abs=1e-3)
    assert all(abs(one - two) > 1e-3 for one, two in zip(few["log_likelihoods"], dense["log_likelihoods"], strict=True))
    assert few["rows_fetched"] == (1 + 2) * 2 * 4 * 4, "a continuation of one token is read with TopN too"


def test_what_is_known_is_not_run_again(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [written(0), written(1), scored(0)]
    first = Answerer(lm, contenders(POLICY, (4,))).answer(questions)
    known = json.loads(json.dumps([row for rows in first for row in rows]))
    monkeypatch.setattr(questions_module, "Prefix", None)
    again = Answerer(lm, contenders(POLICY, (4,)), known)
    assert again.answer(questions) == first and again.skipped == 3


def test_only_what_is_missing_is_run(lm: LoadedModel) -> None:
    first = Answerer(lm, contenders(POLICY, (4,))).answer([written(0)])[0]
    kept: list[Any] = []
    more = Answerer(lm, contenders(POLICY, (4, 8)), first, kept.append)
    (rows,) = more.answer([written(0)])
    assert rows[:2] == first and kept == [[rows[2]]] and rows[2]["topn"] == 8
    changed = Answerer(lm, contenders(POLICY.replace(tail="renormalise"), (4,)), first, kept.append)
    changed.answer([written(0)])
    assert [row["topn"] for row in kept[1]] == [4], "full attention knows no policy"
    put_otherwise = Answerer(lm, contenders(POLICY, (4,)), first, kept.append)
    put_otherwise.answer([written(0, most=5)])
    assert len(kept[2]) == 2


def test_the_examples_of_a_task_are_prefilled_once(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(Prefix):
        def __init__(self, lm: LoadedModel, ids: Any) -> None:
            made.append(len(ids))
            super().__init__(lm, ids)

    monkeypatch.setattr(questions_module, "Prefix", Counted)
    watched: list[tuple[str, int]] = []
    answerer = Answerer(lm, contenders(POLICY, ()), watch=lambda label, done: watched.append((label, done)))
    answerer.answer([written(0), written(1), written(0, "other"), written(1, "other")])
    assert made == [30, 30]
    assert sum(done for _, done in watched) == 4
    assert watched[0] == ("sums: worked examples", 0) and watched[1] == ("sums · 1 of 2", 0)


def test_common_prefix_leaves_something_to_go_on_from() -> None:
    assert common_prefix([(1, 2, 3, 4), (1, 2, 5), (1, 2, 3)]) == [1, 2]
    assert common_prefix([(1, 2, 3)]) == [1, 2]
    assert common_prefix([(1, 2, 3), (1, 2, 3)]) == [1, 2]
    assert common_prefix([(1,), (1, 2)]) == []
    assert common_prefix([(1, 2), (3, 4)]) == []


# -- summing up ----------------------------------------------------------------------------------------------------


def row(doc: int, topn: int | None, reply: str | None, **more: Any) -> dict[str, Any]:
    engine = "dense" if topn is None else "kcache"
    blank = {"task": "sums", "doc": doc, "engine": engine, "topn": topn, "reply": reply, "greedy": None}
    return {**blank, "rows_fetched": topn or 0, "answers": {}, "scores": {}, **more}


def sample(doc: int, answer: str, right: bool, name: str = "strict") -> dict[str, Any]:
    return {"doc_id": doc, "filter": name, "filtered_resps": [answer], "metrics": ["em"], "em": float(right)}


def test_scores_and_agreement_question_by_question() -> None:
    dense = [row(0, None, "it is 1"), row(1, None, "it is 2"), row(2, None, "so 3"), row(3, None, "?")]
    few = [row(0, 4, "it is 1"), row(1, 4, "it is 5"), row(2, 4, "well, 3"), row(3, 4, "it is 4")]
    dense = judged(
        dense,
        "sums",
        [sample(0, "1", True), sample(1, "2", True), sample(2, "3", False), sample(3, "[invalid]", False)],
    )
    few = judged(
        few, "sums", [sample(0, "1", True), sample(1, "5", False), sample(2, "3", False), sample(3, "4", True)]
    )
    full, ours = summarise([*few, *dense, row(9, 4, "not judged")])
    assert (full.engine, full.questions, full.score, full.unanswered) == ("dense", 4, 0.5, 1)
    assert full.stderr == pytest.approx(math.sqrt(4 * 0.25 / 3) / 2)
    assert (full.same_answer, full.same_reply, full.lost, full.won) == (None, None, None, None)
    assert (ours.topn, ours.questions, ours.score, ours.unanswered) == (4, 4, 0.5, 0)
    assert (ours.same_answer, ours.same_reply, ours.lost, ours.won) == (2, 1, 1, 1)
    assert (ours.metric, ours.filter, ours.topn_share, full.topn_share) == ("em", "strict", 1.0, 0.0)


def test_each_filter_is_a_line_and_one_question_has_no_error() -> None:
    samples = [sample(0, "1", True), sample(0, "12", False, "flexible")]
    lines = summarise(judged([row(0, None, "1 2")], "sums", samples))
    assert [(line.filter, line.score) for line in lines] == [("strict", 1.0), ("flexible", 0.0)]
    assert math.isnan(lines[0].stderr)


def test_the_answer_to_a_choice_is_the_likeliest_one() -> None:
    choice = {"doc_id": 0, "filter": "none", "metrics": ["acc", "odd"], "acc": 1.0, "odd": (1, 2)}
    choice |= {"filtered_resps": [(-3.0, False), (-1.0, False)]}
    (line,) = judged([row(0, 4, None, greedy=[False, False])], "sums", [choice])
    assert (line["answers"], line["scores"]) == ({"none": "1"}, {"acc,none": 1.0})
    single = {**choice, "filtered_resps": [(-3.0, True)]}
    assert judged([row(0, 4, "")], "sums", [single])[0]["answers"] == {"none": "greedy"}
    assert judged([row(0, 4, "")], "other", [single])[0]["answers"] == {}


def test_row_keys_tell_settings_apart(lm: LoadedModel) -> None:
    (rows,) = Answerer(lm, contenders(POLICY, (4, 8))).answer([written(0)])
    assert len({row_key(each) for each in rows}) == 3
    assert row_key({**rows[1], "seconds": 9, "scores": {"x": 1}}) == row_key(rows[1])


# -- data in a folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A folder of stock tasks, as lm-eval has them."""
    for name in (
        "gsm8k/gsm8k-cot",
        "bbh/cot_fewshot/_bbh",
        "bbh/cot_fewshot/snarks",
        "bbh/cot_fewshot/navigate",
        "triviaqa/default",
    ):
        path = tmp_path / "stock" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "stock"


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_local_data_changes_nothing_but_where_data_come_from(stock: Path, tmp_path: Path) -> None:
    data = tmp_path / "da ta"
    files = [
        put(data / name)
        for name in ("gsm8k/test.jsonl", "bbh/snarks.json", "bbh/navigate.json", "triviaqa/validation.jsonl")
    ]
    found = local_tasks(["gsm8k", "bbh", "triviaqa"], data, stock)
    assert [task.name for task in found] == [
        "gsm8k_cot",
        "bbh_cot_fewshot_navigate",
        "bbh_cot_fewshot_snarks",
        "triviaqa",
    ]
    for task in found:
        task.write(tmp_path)
    sums, _, snarks, trivia = (yaml.safe_load((tmp_path / f"{task.name}.yaml").read_text()) for task in found)
    changed = {"task": "gsm8k_cot", "dataset_path": "json", "dataset_name": None}
    assert sums == {
        **changed,
        "include": str(stock / "gsm8k/gsm8k-cot.yaml"),
        "dataset_kwargs": {"data_files": {"test": str(files[0])}},
    }
    assert snarks["dataset_kwargs"] == {"data_files": {"test": str(files[1])}, "field": "examples"}
    assert (
        trivia["dataset_kwargs"] == {"data_files": {"validation": str(files[3])}} and trivia["training_split"] is None
    )
    (single,) = local_tasks(["bbh:snarks"], data, stock)
    assert single == found[2]
    put(tmp_path / "flat/test.jsonl")
    assert local_tasks(["gsm8k"], tmp_path / "flat", stock)[0].data.name == "test.jsonl"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["gsm8k"], "no data for gsm8k: .*gsm8k/test.jsonl does not exist"),
        (["bbh:snarks"], "no data for bbh:snarks"),
        (["bbh:quark"], "after bbh: comes one of navigate, snarks"),
        (["hellaswag"], "leave it out to fetch hellaswag"),
    ],
)
def test_missing_data_are_named(stock: Path, tmp_path: Path, names: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        local_tasks(names, tmp_path, stock)
    with pytest.raises(InputError, match="not a folder"):
        local_tasks(names, tmp_path / "nowhere", stock)


def test_names(tmp_path: Path) -> None:
    names = ["gsm8k", "bbh", "bbh:snarks", "triviaqa", "hellaswag"]
    assert [stock_name(name) for name in names] == [
        "gsm8k_cot", "bbh", "bbh_cot_fewshot_snarks", "triviaqa", "hellaswag",
    ]  # fmt: skip
    assert task_folders(names, tmp_path) is None
    assert task_folders(names[:4], tmp_path) == [
        tmp_path / "gsm8k",
        tmp_path / "bbh/cot_fewshot",
        tmp_path / "triviaqa",
    ]
