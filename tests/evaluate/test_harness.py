"""The adapter to lm-eval: the prompts and scores are lm-eval's, full attention's answers those of its own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is the extra eval")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kcache.errors import InputError
from kcache.evaluate.agreement import summarise
from kcache.evaluate.forks import contenders
from kcache.evaluate.harness import AnsweringLM, Tasks, evaluate, open_tasks
from kcache.evaluate.questions import Answerer
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from tests.bench.machines import tiny

POLICY = Policy.paper(dense_layers=1, offload="all")
SUMS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in (2, 3, 4)]
SNARKS = {"examples": [{"input": f"Which is {n}?", "target": "(A)"} for n in (1, 2)]}
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: %s
test_split: test
doc_to_text: "{{q}}"
doc_to_target: %s
doc_to_choice: ["no", "certainly yes"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return tiny(max_position_embeddings=8192)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bbh").mkdir()
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    (tmp_path / "bbh" / "snarks.json").write_text(json.dumps(SNARKS))
    return tmp_path


def stock(lm: LoadedModel, tasks: Tasks, **more: Any) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's own model says."""
    model = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=1)
    results: Any = simple_evaluate(model, tasks=[*tasks.names], task_manager=tasks.manager, bootstrap_iters=0, **more)
    return dict(results["samples"])


def test_benchmarks_with_local_data(lm: LoadedModel, data: Path) -> None:
    with open_tasks(["gsm8k", "bbh:snarks"], data) as tasks:
        rows = evaluate(Answerer(lm, contenders(POLICY, (4, 8192))), tasks, limit=2, most=12)
        wanted = stock(lm, tasks, limit=2, gen_kwargs={"max_gen_toks": 12})
    lines = summarise(rows)
    first = lines[:3]
    assert {(line.task, line.filter, line.questions) for line in first} == {("gsm8k_cot", "strict-match", 2)}
    assert [line.topn for line in first] == [None, 4, 8192]
    every = [line for line in lines if line.topn == 8192]
    assert [(line.filter, line.same_answer, line.same_reply) for line in every] == [
        ("strict-match", 2, 2), ("flexible-extract", 2, 2), ("get-answer", 2, 2),
    ]  # fmt: skip
    for row in rows:
        if row["engine"] == "dense":
            samples = [each for each in wanted[row["task"]] if each["doc_id"] == row["doc"]]
            assert row["reply"] == samples[0]["resps"][0][0]
            assert row["answers"] == {each["filter"]: each["filtered_resps"][0] for each in samples}
            assert row["scores"] == {f"exact_match,{each['filter']}": each["exact_match"] for each in samples}


@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood"])
def test_continuations_are_scored_as_by_lm_eval(lm: LoadedModel, data: Path, kind: str) -> None:
    docs = [{"q": "Does the sun rise?", "answer": 1}, {"q": "", "answer": 0}, {"q": "Is it so? ", "answer": 0}]
    (data / "choices.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (data / "tasks").mkdir()
    target = "answer" if kind == "multiple_choice" else '"no way"'
    text = CHOICES % (json.dumps(str(data / "choices.jsonl")), kind, target)
    if kind == "loglikelihood":
        text = text.replace('doc_to_choice: ["no", "certainly yes"]\n', "")
    (data / "tasks" / "choices.yaml").write_text(text)
    tasks = Tasks(("choices",), TaskManager(include_defaults=False, include_path=[data / "tasks"]))
    rows = evaluate(Answerer(lm, contenders(POLICY, (4, 8192))), tasks)
    wanted = {each["doc_id"]: each for each in stock(lm, tasks)["choices"]}
    for row in rows:
        responses = wanted[row["doc"]]["filtered_resps"]
        if row["topn"] != 4:
            assert row["log_likelihoods"] == pytest.approx([total for total, _ in responses], abs=1e-3)
            assert row["greedy"] == [greedy for _, greedy in responses]
            assert row["scores"] == {"acc,none": wanted[row["doc"]]["acc"]}
        else:
            assert row["rows_fetched"] > 0
    few = [row["log_likelihoods"] for row in rows if row["topn"] == 4]
    assert few[0] != pytest.approx([total for total, _ in wanted[0]["filtered_resps"]], abs=1e-3)


def test_names_are_checked(data: Path) -> None:
    with (
        pytest.raises(InputError, match="no task 'bbh_cot_fewshot_snark'; it has bbh_cot_fewshot_snarks"),
        open_tasks(["bbh:snark"]),
    ):
        pass


def test_data_out_of_reach_are_said(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub.")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with (
        open_tasks(["gsm8k"]) as tasks,
        pytest.raises(InputError, match="gsm8k_cot cannot be had: Couldn't reach the Hub; of gsm8k"),
    ):
        evaluate(Answerer(lm, contenders(POLICY, (4,))), tasks)


def test_what_cannot_be_run_is_refused(lm: LoadedModel) -> None:
    from lm_eval.api.instance import Instance

    model = AnsweringLM(Answerer(lm, contenders(POLICY, (4,))))
    text = Instance("loglikelihood_rolling", {}, ("some text",), 0, ("wikitext", 0, 1))
    with pytest.raises(InputError, match=r"wikitext.*kcache eval fidelity"):
        model.loglikelihood_rolling([text])
    sampled = Instance("generate_until", {}, ("Q", {"do_sample": True, "temperature": 1.0}), 0, ("dice", 0, 1))
    with pytest.raises(InputError, match="dice samples"):
        model.generate_until([sampled])


def test_a_prompt_longer_than_the_context_loses_its_beginning(lm: LoadedModel) -> None:
    from lm_eval.api.instance import Instance

    short = tiny(max_position_embeddings=64)
    answerer = Answerer(short, contenders(POLICY, (4,)))
    model = AnsweringLM(answerer)
    model.generate_until([Instance("generate_until", {}, ("x" * 80, {"max_gen_toks": 10}), 0, ("long", 0, 1))])
    assert model.rows[0]["prompt_tokens"] == 54
    model.loglikelihood([Instance("loglikelihood", {}, ("x" * 80, "yes"), 0, ("long", 1, 1))])
    assert model.rows[1]["prompt_tokens"] == 61
