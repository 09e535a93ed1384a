"""Scores of a benchmark side by side, and how often two ways of decoding give the same answer to the same question.

A small model gets few questions right, and two scores near zero agree whatever the model says. Question by question it
shows: the same answer read out of the reply, the same reply to the letter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
NO_ANSWER = "[invalid]"
"""What a filter writes when it finds no answer in a reply."""


@dataclass(frozen=True)
class Summary:
    """One contender's answers to a task, as one filter reads and one metric scores them, beside full attention's.

    Attributes
    ----------
    task, metric, filter : str
    engine : str
    topn : int or None
    questions : int
    score, stderr : float
        Mean over the questions, and its standard error (NaN for a single question).
    unanswered : int
        Replies the filter found no answer in.
    same_answer, same_reply : int or None
        Questions to which full attention gave the same answer, and said the same to the letter; None for itself.
    lost, won : int or None
        Questions that score lower and higher than with full attention.
    topn_share : float
        Share of questions for which rows were fetched; the others were decoded exactly.
    """

    task: str
    metric: str
    filter: str
    engine: str
    topn: int | None
    questions: int
    score: float
    stderr: float
    unanswered: int
    same_answer: int | None
    same_reply: int | None
    lost: int | None
    won: int | None
    topn_share: float


def judged(rows: Iterable[Row], task: str, samples: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Add to rows of a task what lm-eval read out of their replies and how it scored that.

    Parameters
    ----------
    rows : iterable of dict
        Of one contender.
    task : str
    samples : sequence of mapping
        As lm-eval logs them: one per document and filter.
    """
    answers: dict[int, dict[str, str]] = {}
    scores: dict[int, dict[str, float]] = {}
    for sample in samples:
        doc, name = int(sample["doc_id"]), str(sample["filter"])
        answers.setdefault(doc, {})[name] = _answer(sample["filtered_resps"])
        values = {f"{metric},{name}": sample[metric] for metric in sample["metrics"]}
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (bool, int, float))}
        scores.setdefault(doc, {}).update(numbers)
    return [
        {**row, "answers": answers[row["doc"]], "scores": scores[row["doc"]]}
        if row["task"] == task and row["doc"] in answers
        else row
        for row in rows
    ]


def _answer(responses: Sequence[Any]) -> str:
    """The answer in a document's filtered responses: a text, or the number of the likeliest choice."""
    first = responses[0]
    if isinstance(first, (tuple, list)):
        if len(responses) == 1:
            return "greedy" if first[1] else "not greedy"
        return str(max(range(len(responses)), key=lambda number: responses[number][0]))
    return str(first)


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Sum up judged rows by task, metric and filter, full attention first; rows not judged yet are left out."""
    done = [row for row in rows if row["scores"]]
    keys = dict.fromkeys((row["task"], key) for row in done for key in row["scores"])
    order = dict.fromkeys((row["engine"], row["topn"]) for row in done)
    contenders = sorted(order, key=lambda pair: (pair[1] is not None, pair[1] or 0))
    return [
        summary
        for task, key in keys
        for engine, topn in contenders
        if (summary := _summary(done, task, key, engine, topn)) is not None
    ]


def _summary(rows: Sequence[Row], task: str, key: str, engine: str, topn: int | None) -> Summary | None:
    mine = [row for row in rows if (row["task"], row["engine"], row["topn"]) == (task, engine, topn)]
    mine = [row for row in mine if key in row["scores"]]
    if not mine:
        return None
    metric, _, name = key.partition(",")
    values = [row["scores"][key] for row in mine]
    dense = {row["doc"]: row for row in rows if row["task"] == task and row["engine"] == "dense"}
    pairs = [(dense[row["doc"]], row) for row in mine if row["doc"] in dense]
    beside = engine != "dense" and bool(pairs)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Summary(
        task=task,
        metric=metric,
        filter=name,
        engine=engine,
        topn=topn,
        questions=len(values),
        score=statistics.fmean(values),
        stderr=spread / math.sqrt(len(values)),
        unanswered=sum(row["answers"].get(name) == NO_ANSWER for row in mine),
        same_answer=sum(one["answers"].get(name) == two["answers"].get(name) for one, two in pairs) if beside else None,
        same_reply=sum(_said(one) == _said(two) for one, two in pairs) if beside else None,
        lost=sum(two["scores"][key] < one["scores"].get(key, 0) for one, two in pairs) if beside else None,
        won=sum(two["scores"][key] > one["scores"].get(key, 0) for one, two in pairs) if beside else None,
        topn_share=sum(row["rows_fetched"] > 0 for row in mine) / len(mine),
    )


def _said(row: Row) -> Any:
    """What a contender said, to the letter; of continuations it only scored, which of them greedy decoding says."""
    return row["greedy"] if row["reply"] is None else row["reply"]
