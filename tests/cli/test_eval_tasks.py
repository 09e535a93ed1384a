"""``kcache eval tasks``: flags to questions, a table of scores and agreement, resuming."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kcache_cli.evaluate.tasks_table import markdown
from tests.bench.machines import tiny
from tests.cli.conftest import Run
from tests.cli.test_real import LoadedEngine

SUMS = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in (2, 3, 4)]


def test_without_lm_eval_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("eval", "tasks", engine=object())
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "kcache: error: kcache eval tasks needs lm-eval, which is not installed: pip install 'kcache-llm[eval]'"
    ]


def test_the_help_says_why_continuations_are_stepped(run: Run) -> None:
    text = " ".join(run("eval", "tasks", "--help").stdout.split())
    assert "would show a perfect match under any policy" in text
    assert "weak evidence" in text and "kcache eval tasks --tasks gsm8k --limit 50" in text


def row(doc: int, topn: int | None, answer: str, score: float | None) -> dict[str, Any]:
    values = {"task": "gsm8k_cot", "doc": doc, "engine": "dense" if topn is None else "kcache", "topn": topn}
    said = {"reply": answer, "greedy": None, "answers": {"strict": answer}, "rows_fetched": topn or 0}
    where = {"model": "m", "dtype": "float32", "device": "cpu"}
    return {**values, **said, **where, "scores": {} if score is None else {"exact_match,strict": score}}


def test_a_line_for_each_metric_and_contender() -> None:
    rows = [row(0, None, "1", 1.0), row(0, 64, "1", 1.0), row(1, None, "2", 1.0), row(1, 64, "[invalid]", 0.0)]
    head, _, dense, ours, *rest = markdown([*rows, row(2, 64, "x", None)]).splitlines()
    heads, first, second = ([cell.strip() for cell in line.strip("| ").split("|")] for line in (head, dense, ours))
    assert heads == [
        "task", "metric", "engine", "questions", "score", "no answer", "same answer", "same reply", "lost", "won",
    ]  # fmt: skip
    assert first[:5] == ["gsm8k_cot", "exact_match, strict", "dense", "2", "1.000 ± 0.000"]
    assert second[2:] == ["N=64", "2", "0.500 ± 0.500", "1", "1", "1", "1", "0"]
    assert "1 rows are not judged yet; --resume finishes the run" in rest
    assert markdown([]) == ""


# -- with lm-eval --------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is the extra eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SUMS))
    return tmp_path


@pytest.fixture(scope="module")
def engine() -> LoadedEngine:
    return LoadedEngine(tiny(max_position_embeddings=8192))


def test_killed_and_resumed(run: Run, engine: LoadedEngine, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = data / "rows.jsonl"
    args = ["eval", "tasks", "--data", str(data), "--limit", "2", "-n", "6", "--topn", "4", "--dense-layers", "1"]
    args += ["--output", str(output)]
    first = run(*args, engine=engine)
    assert first.exit_code == 0, first.stderr
    assert "asking gsm8k_cot · 2 of 2" in first.stderr and "warning" not in first.stderr
    lines = output.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [(each["doc"], each["topn"]) for each in rows] == [(0, None), (0, 4), (1, None), (1, 4)]
    assert all(set(each["scores"]) == {"exact_match,strict-match", "exact_match,flexible-extract"} for each in rows)
    assert rows[1]["policy"]["dense_below"] == 0 and rows[1]["env"]["run"] == "host-only"
    output.write_text("".join(lines[:2]) + lines[2][:50])  # killed in the middle of a line
    again = run(*args, "--resume", engine=engine)
    assert again.exit_code == 0, again.stderr
    assert "1 case was there already" in again.stderr
    after = [json.loads(line) for line in output.read_text().splitlines()]
    for one, two in zip(rows, after, strict=True):
        assert {**one, "seconds": 0, "env": 0} == {**two, "seconds": 0, "env": 0}
    monkeypatch.setattr("kcache.evaluate.questions.Prefix", None)
    third = run(*args, "--resume", engine=engine)
    assert third.exit_code == 0 and third.stdout == again.stdout
    more = run(*args, "--resume", "--policy", "paper", engine=engine)
    assert more.exit_code == 1, "another policy is another run"


def test_rows_on_standard_output_are_judged(run: Run, engine: LoadedEngine, data: Path) -> None:
    args = ["eval", "tasks", "--data", str(data), "--limit", "1", "-n", "4", "--topn", "4", "-o", "jsonl"]
    result = run(*args, engine=engine)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2 and all(row["scores"] for row in rows)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tasks bbh:snarks", "no data for bbh:snarks"),
        ("--tasks nothing", "data serves gsm8k, bbh and triviaqa"),
        ("--limit 0", "--limit"),
        ("--resume", "--resume reads what --output holds"),
        ("--output x.foo", "the name must end in .md, .csv, .json, .jsonl"),
        ("--topn x", "--topn x"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(run: Run, data: Path, flags: str, said: str) -> None:
    result = run("eval", "tasks", "--data", str(data), *flags.split(), engine=object())
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
