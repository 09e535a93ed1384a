"""Running a batch job: what to run, in which batches, and what became of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kcache.errors import InputError
from kcache.policy import Policy
from kcache_cli.batch.inputs import BadLine, Entry
from kcache_cli.batch.journal import Journal, Result
from kcache_cli.batch.output import OrderedOutput
from kcache_cli.batch.plan import Sizes, batch_seed, form_batches
from kcache_cli.batch.progress import Watch
from kcache_cli.engine import Engine
from kcache_cli.options import ModelOptions
from kcache_cli.text import json_line

if TYPE_CHECKING:
    from kcache import Sampling

Batches = Sequence[tuple[int, Sequence["Work"]]]
"""Batches with their numbers."""
Decoder = Callable[["Job", Any, Batches, Watch], Iterator[tuple[int, list[Result]]]]
"""Runs batches, in whatever order, and yields the results of each with its number."""


@dataclass(frozen=True)
class Work:
    """One prompt that will be run: its line and id, and its tokens."""

    entry: Entry
    ids: list[int]


@dataclass(frozen=True)
class Job:
    """What is run, and how."""

    engine: Engine
    model: ModelOptions
    policy: Policy
    sampling: Sampling
    seed: int
    max_tokens: int
    allow_overflow: bool
    stop: tuple[str, ...] = ()

    def decode(self, lm: Any, work: Sequence[Work], number: int, watch: Watch) -> list[Result]:
        """Run one batch."""
        texts: list[list[str]] = [[] for _ in work]
        results: list[Result] = [{} for _ in work]
        tokens = sum(len(item.ids) for item in work)
        watch.begin([str(item.entry.id) for item in work])
        events = self.engine.generate(
            lm,
            [item.ids for item in work],
            self.policy,
            sampling=replace(self.sampling, seed=batch_seed(self.seed, number)),
            max_new_tokens=self.max_tokens,
            stop=self.stop,
            allow_overflow=self.allow_overflow,
            read=lambda done, total: watch.read(tokens * done // total, tokens),
        )
        for event in events:
            texts[event.index].append(event.text)
            if event.finish_reason is not None:
                results[event.index] = {
                    "id": work[event.index].entry.id,
                    "text": "".join(texts[event.index]),
                    "finish_reason": event.finish_reason,
                    "prompt_tokens": event.prompt_tokens,
                    "completion_tokens": event.completion_tokens,
                }
            watch.count(event)
        return results


def prepare(job: Job, lm: Any, entries: Sequence[Entry]) -> tuple[list[Work], list[BadLine]]:
    """Turn prompts into tokens, in input order; those the model cannot take become bad lines."""
    work: list[Work] = []
    bad: list[BadLine] = []
    context = None if job.allow_overflow else lm.context_length
    for entry in entries:
        try:
            ids = job.engine.encode(lm, entry.prompt)
        except InputError as error:
            bad.append(BadLine(entry.line, str(error)))
            continue
        if context is not None and len(ids) >= context:
            reason = f"the prompt is {len(ids):,} tokens and the context of {lm.name} is {context:,}"
            bad.append(BadLine(entry.line, f"{reason}; shorten it, or use --allow-overflow"))
            continue
        work.append(Work(entry, ids))
    return work, bad


def one_by_one(job: Job, lm: Any, batches: Batches, watch: Watch) -> Iterator[tuple[int, list[Result]]]:
    """Run batches here, in their order."""
    for number, work in batches:
        yield number, job.decode(lm, work, number, watch)


@dataclass
class Todo:
    """What a job has to do.

    Attributes
    ----------
    batches : list of list of int
        Positions of the prompts of every batch.
    done : dict of int to result
        The results there are, by position.
    remaining : list of int
        The batches still to run.
    """

    batches: list[list[int]]
    done: dict[int, Result]
    remaining: list[int]


def plan_work(work: Sequence[Work], sizes: Sizes, new_tokens: int, journal: Journal | None, written: int) -> Todo:
    """Form the batches, and say which must still run: those not in the journal and not wholly written."""
    kept = {} if journal is None else {json_line(result["id"]): result for result in journal.kept}
    finished = {} if journal is None else journal.finished
    done = {position: kept[key] for position, item in enumerate(work) if (key := json_line(item.entry.id)) in kept}
    left = [position for position in range(len(work)) if position not in done]
    formed = form_batches([work[position].ids for position in left], sizes, new_tokens)
    batches = [[left[place] for place in batch] for batch in formed]
    remaining = []
    for number, batch in enumerate(batches):
        if number in finished and _belongs(work, batch, finished[number]):
            done.update(zip(batch, finished[number], strict=True))
        elif any(position >= written for position in batch):
            remaining.append(number)
    return Todo(batches, done, remaining)


def _belongs(work: Sequence[Work], batch: list[int], results: list[Result]) -> bool:
    return [work[position].entry.id for position in batch] == [result.get("id") for result in results]


def run_batches(
    job: Job,
    lm: Any,
    work: Sequence[Work],
    todo: Todo,
    output: OrderedOutput,
    journal: Journal | None,
    watch: Watch,
    decode: Decoder,
) -> None:
    """Run what remains; results reach the journal first and the output when their turn comes."""
    output.add(todo.done.items())
    batches = [(number, [work[position] for position in todo.batches[number]]) for number in todo.remaining]
    for number, results in decode(job, lm, batches, watch):
        if journal is not None:
            journal.record(number, results)
        output.add(zip(todo.batches[number], results, strict=True))
