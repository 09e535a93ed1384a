"""Answering the questions of a benchmark with full attention and with every N, after one exact prefill each.

The questions of a task begin with the same worked examples: these are prefilled once per task, the rest of a prompt
once per question. A reply is decoded greedily. A continuation that is to be scored is fed by decode steps, and so is
the last token before it: a forward over the whole of it, which is what benchmarks do, attends exactly and would find
any policy perfect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kcache.cache import settled
from kcache.decoding.prompts import alike
from kcache.evaluate.forks import Contender, Prefix

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A prompt, and the continuation whose probability is asked for; None where the model is to write one."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Question:
    """One document of a task: one part, or one per choice.

    Attributes
    ----------
    task : str
    doc : int
        Its number in the task.
    parts : tuple of Part
    max_new_tokens, stop
        Of a reply.
    """

    task: str
    doc: int
    parts: tuple[Part, ...]
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What tells this question from one that is put differently."""
        return sha256(repr((self.parts, self.max_new_tokens, self.stop)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Answered:
    """What one contender made of one question.

    Attributes
    ----------
    task, doc, digest
        The question.
    engine : {"dense", "kcache"}
        Full attention, or TopN decoding.
    topn : int or None
    model, dtype, device : str
    policy : dict or None
    prompt_tokens : int
        The longest prompt.
    reply : str or None
    log_likelihoods : list of float or None
        Of each continuation.
    greedy : list of bool or None
        Whether each continuation is what greedy decoding says.
    rows_fetched : int
        V rows fetched; 0 means that every step attended exactly.
    seconds : float
        For decoding, without the prefill.
    answers, scores : dict
        By a task's filters: the answer that was read out of the reply, and by metric and filter, its score. Empty
        until the task has been judged.
    env : dict
        Where and when.
    """

    task: str
    doc: int
    digest: str
    engine: str
    topn: int | None
    model: str
    dtype: str
    device: str
    policy: dict[str, Any] | None
    prompt_tokens: int
    reply: str | None = None
    log_likelihoods: list[float] | None = None
    greedy: list[bool] | None = None
    rows_fetched: int = 0
    seconds: float = 0.0
    answers: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> Row:
        """Return the fields as plain values, in order."""
        return asdict(self)


_SAME = ("task", "doc", "digest", "engine", "topn", "model", "dtype", "device")


class Answerer:
    """Answers questions, but those whose answers are known.

    Parameters
    ----------
    lm : LoadedModel
    contenders : sequence of Contender
    known : iterable of dict
        Rows of an earlier run.
    keep : callable
        Given the rows of a question as soon as they are there.
    watch : callable
        Told what is under way, and how many questions have ended with it.
    env : dict, optional
        Stamped on every row.

    Attributes
    ----------
    skipped : int
        Questions so far whose answers were all known.
    """

    def __init__(
        self,
        lm: LoadedModel,
        contenders: Sequence[Contender],
        known: Iterable[Row] = (),
        keep: Callable[[list[Row]], None] = lambda rows: None,
        watch: Callable[[str, int], None] = lambda label, done: None,
        env: dict[str, Any] | None = None,
    ) -> None:
        self.lm, self.contenders = lm, tuple(contenders)
        self._known = {row_key(row): row for row in known}
        self._keep, self._watch, self._env = keep, watch, env or {}
        self._ended: set[tuple[str, int]] = set()
        self.skipped = 0

    def answer(self, questions: Sequence[Question]) -> list[list[Row]]:
        """Return the rows of each question, one per contender, in order."""
        by_task = groupby(questions, lambda question: question.task)
        return [rows for _, group in by_task for rows in self._task([*group])]

    def known(self, question: Question, contender: Contender) -> Row | None:
        """The row of an answer that was given before, under the same settings."""
        return self._known.get(row_key(self._blank(question, contender)))

    def _task(self, questions: list[Question]) -> Iterator[list[Row]]:
        shared = common_prefix([part.prompt for question in questions for part in question.parts])
        prefix: Prefix | None = None
        for number, question in enumerate(questions, start=1):
            label = f"{question.task} · {number} of {len(questions)}"
            missing = [each for each in self.contenders if self.known(question, each) is None]
            if missing:
                if prefix is None:
                    self._watch(f"{question.task}: worked examples", 0)
                    prefix = Prefix(self.lm, shared)
                self._watch(label, 0)
                rows = self._run(question, missing, prefix)
                self._known |= {row_key(row): row for row in rows}
                self._keep(rows)
            if (question.task, question.doc) not in self._ended:
                self._ended.add((question.task, question.doc))
                self.skipped += not missing
                self._watch(label, 1)
            found = [self.known(question, each) for each in self.contenders]
            yield [row for row in found if row is not None]

    def _run(self, question: Question, contenders: list[Contender], prefix: Prefix) -> list[Row]:
        """Answer one question; a part's prompt is prefilled once for all."""
        rows = [self._blank(question, contender) for contender in contenders]
        for part in question.parts:
            own = part.prompt[len(prefix.ids) :]
            if part.continuation is None:
                fork = prefix.fork(own, [each.policy for each in contenders], question.max_new_tokens)
            else:
                fork = prefix.fork(own[:-1], [each.policy for each in contenders], len(part.continuation) + 1)
            for row, cache in zip(rows, fork.caches, strict=True):
                began, fetched = time.perf_counter(), cache.stats.rows_fetched
                if part.continuation is None:
                    row["reply"] = fork.reply(cache, (), question.max_new_tokens, question.stop)
                else:
                    total, greedy = fork.log_likelihood(cache, own[-1:], part.continuation)
                    row["log_likelihoods"] = [*(row["log_likelihoods"] or ()), total]
                    row["greedy"] = [*(row["greedy"] or ()), greedy]
                row["rows_fetched"] += cache.stats.rows_fetched - fetched
                row["seconds"] = round(row["seconds"] + time.perf_counter() - began, 3)
        return rows

    def _blank(self, question: Question, contender: Contender) -> Row:
        return Answered(
            task=question.task,
            doc=question.doc,
            digest=question.digest,
            engine=contender.engine,
            topn=contender.topn,
            model=self.lm.name,
            dtype=str(self.lm.model.dtype).removeprefix("torch."),
            device=str(self.lm.device),
            policy=None if contender.topn is None else settled(contender.policy, self.lm.model).to_dict(),
            prompt_tokens=max(len(part.prompt) for part in question.parts),
            env=self._env,
        ).to_dict()


def row_key(row: Row) -> tuple[Any, ...]:
    """What makes two rows answers to the same question, given in the same way."""
    policy = row.get("policy")
    return (*(row.get(name) for name in _SAME), None if policy is None else tuple(sorted(policy.items())))


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Ids all prompts begin with, at least one short of the shortest: something must be left to go on from."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    return first[: min(alike(first, last), min(map(len, prompts)) - 1)]
