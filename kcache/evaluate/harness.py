"""Benchmarks through lm-eval (the extra ``eval``): its prompts and its scoring, our decoding.

lm-eval runs once per contender on a model that answers from :class:`~kcache.evaluate.questions.Answerer`. The first
run computes what all contenders say, question by question after one shared prefill; the others find it there.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from kcache.errors import InputError
from kcache.evaluate.agreement import judged
from kcache.evaluate.forks import Contender
from kcache.evaluate.localdata import local_tasks, stock_name, task_folders
from kcache.evaluate.questions import Answerer, Part, Question, Row

_TASKS = Path(lm_eval.tasks.__file__).parent


class AnsweringLM(HFLM):
    """lm-eval's Hugging Face model whose answers are those of one contender of an :class:`Answerer`.

    Parameters
    ----------
    answerer : Answerer
    most : int or None
        Longest reply in tokens, where that is to be less than the task's own.
    """

    def __init__(self, answerer: Answerer, most: int | None = None) -> None:
        lm = answerer.lm
        super().__init__(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=1)
        self.answerer, self.most = answerer, most
        self.begin(answerer.contenders[0])

    def begin(self, contender: Contender) -> None:
        """Answer as ``contender`` from now on; ``rows`` are its answers since."""
        self._place = self.answerer.contenders.index(contender)
        self.rows: list[Row] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decode a reply to each request, greedily, up to the task's stop strings."""
        return [row["reply"] for row, _ in self._answers([self._to_write(request) for request in requests])]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score each continuation token by token."""
        answers = self._answers([self._to_score(request) for request in requests])
        return [(row["log_likelihoods"][part], row["greedy"][part]) for row, part in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse: :mod:`kcache.evaluate.fidelity` measures perplexity, and in far less time."""
        raise InputError(
            f"{requests[0].task_name} asks for the perplexity of whole texts; kcache eval fidelity measures that"
        )

    def _answers(self, asked: list[Question]) -> list[tuple[Row, int]]:
        """Answer questions of one part each, those of a document as one; a row and the place in it for each."""
        questions: list[Question] = []
        places: list[tuple[int, int]] = []
        for number, (_, group) in enumerate(groupby(asked, lambda question: (question.task, question.doc))):
            same = [*group]
            parts = [part for question in same for part in question.parts]
            questions.append(replace(same[0], parts=tuple(parts)))
            places += [(number, place) for place in range(len(parts))]
        mine = [rows[self._place] for rows in self.answerer.answer(questions)]
        self.rows += mine
        return [(mine[number], place) for number, place in places]

    def _to_write(self, request: Instance) -> Question:
        context, options = request.args
        settings: dict[str, Any] = {**normalize_gen_kwargs(options, self.max_gen_toks)}
        if settings.get("do_sample"):
            raise InputError(f"{request.task_name} samples its replies; kcache eval decodes greedily")
        most = min(settings["max_gen_toks"], self.most or settings["max_gen_toks"])
        ids = self.tok_encode(context, left_truncate_len=self.max_length - most)
        stop = handle_stop_sequences(settings.get("until"), eos=None)
        return Question(str(request.task_name), int(request.doc_id or 0), (Part(tuple(ids)),), most, tuple(stop))

    def _to_score(self, request: Instance) -> Question:
        context, continuation = request.args
        if context:
            prompt, rest = self._encode_pair(context, continuation)
        else:
            prompt, rest = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        prompt = prompt[-max(1, self.max_length - len(rest)) :]
        return Question(str(request.task_name), int(request.doc_id or 0), (Part(tuple(prompt), tuple(rest)),))


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows, by its own names for them."""

    names: tuple[str, ...]
    manager: TaskManager


@contextmanager
def open_tasks(names: Sequence[str], data: Path | None = None) -> Iterator[Tasks]:
    """Find tasks, for as long as the body runs.

    Parameters
    ----------
    names : sequence of str
        See :func:`~kcache.evaluate.localdata.stock_name`.
    data : Path, optional
        A folder with the tasks' data, see :func:`~kcache.evaluate.localdata.local_tasks`; without it they come from
        the hub.

    Raises
    ------
    InputError
        If a task is not known, or a file of its data is missing.
    """
    with _quiet(), TemporaryDirectory() as folder:
        if data is not None:
            for task in local_tasks(names, data, _TASKS):
                task.write(Path(folder))
        folders = task_folders(names, _TASKS)
        manager = TaskManager(include_defaults=folders is None, include_path=[*(folders or ()), folder])
        specs = tuple(dict.fromkeys(stock_name(name) for name in names))
        for spec in specs:
            if spec not in manager.all_tasks:
                near = difflib.get_close_matches(spec, manager.all_tasks, n=3)
                raise InputError(f"lm-eval has no task {spec!r}" + (f"; it has {', '.join(near)}" if near else ""))
        yield Tasks(specs, manager)


def evaluate(answerer: Answerer, tasks: Tasks, limit: int | None = None, most: int | None = None) -> list[Row]:
    """Run tasks with every contender; returns the rows of all questions, judged.

    Parameters
    ----------
    answerer : Answerer
    tasks : Tasks
    limit : int, optional
        Questions per task, the first ones.
    most : int, optional
        Longest reply in tokens, where that is to be less than the task's own.

    Raises
    ------
    InputError
        If the data of a task cannot be had, or it is of a kind that cannot be run.
    """
    model = AnsweringLM(answerer, most)
    return [row for contender in answerer.contenders for row in _judge(model, contender, tasks, limit)]


def _judge(model: AnsweringLM, contender: Contender, tasks: Tasks, limit: int | None) -> list[Row]:
    """Let lm-eval put the questions to one contender and judge its answers."""
    model.begin(contender)
    try:
        results = lm_eval.evaluator.simple_evaluate(
            model, tasks=[*tasks.names], task_manager=tasks.manager, limit=limit, bootstrap_iters=0
        )
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"the data of {', '.join(tasks.names)} cannot be had: {reason}; of gsm8k, bbh and triviaqa they may be "
            "files in a folder, which data names"
        ) from error
    rows = model.rows
    for task, samples in (results or {}).get("samples", {}).items():
        rows = judged(rows, task, samples)
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from drawing bars and telling how they are, and from asking git where it is none."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars, drawn = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    git = lm_eval.evaluator.get_git_commit_hash
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(drawn, disable=True)
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = drawn
        lm_eval.evaluator.get_git_commit_hash = git
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
