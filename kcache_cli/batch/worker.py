"""What runs on the workers of a Ray cluster: the actor that holds a model, and the planning of its memory.

Errors that the user can do something about travel back as values: Ray would take them for accidents and try again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from kcache import errors
from kcache.errors import DoesNotFitError, KCacheError
from kcache.models.progress import ignore_progress
from kcache.planning.sizes import LEAST_RESERVE
from kcache.policy import Policy
from kcache_cli import exits
from kcache_cli.batch.inputs import Entry
from kcache_cli.batch.journal import Result
from kcache_cli.batch.progress import Meter
from kcache_cli.batch.run import Job, Work
from kcache_cli.engine import Plan
from kcache_cli.options import ModelOptions
from kcache_cli.text import json_line

MOST_ATTEMPTS = 4
"""How often a batch is begun: a worker that dies is replaced, but not for ever by one that dies of the same batch."""


class Attempts:
    """An actor that counts how often each batch has been begun."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}

    def begin(self, number: int) -> int:
        """Count one more beginning of a batch; returns how many there have been."""
        self._begun[number] = self._begun.get(number, 0) + 1
        return self._begun[number]


class Worker:
    """The actor: loads the model once, then runs the batches it is given.

    Parameters
    ----------
    job : Job
    threads : int or None
        CPU threads to compute with; None leaves it to the environment.
    gpus : float
        What part of a GPU, or how many, Ray has given it.
    attempts : actor handle
        Of :class:`Attempts`.
    """

    def __init__(self, job: Job, threads: int | None, gpus: float, attempts: Any) -> None:
        import torch

        self._attempts = attempts

        if threads is not None:
            torch.set_num_threads(threads)
        self._problem: Exception | None = None
        try:
            self._lm = job.engine.load(job.model, ignore_progress)
            self._job = replace(job, policy=_within(job.policy, gpus))
        except Exception as error:
            self._problem = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run one batch of prompts, a row of ``number`` and ``work``; returns a row of ``number`` and ``told``."""
        number = int(batch["number"][0])
        try:
            if self._problem is not None:
                raise self._problem
            attempt = self._begin(number)
            work = unpack(str(batch["work"][0]))
            unwatched = Meter(len(work), 0, self._job.max_tokens)  # results are counted when they come back
            results = self._job.decode(self._lm, work, number, unwatched)
            told: dict[str, Any] = {"attempt": attempt, "results": results}
        except Exception as error:
            told = {"problem": _described(error)}
        return {"number": [number], "told": [json_line(told)]}

    def _begin(self, number: int) -> int:
        import ray

        attempt: int = ray.get(self._attempts.begin.remote(number))
        if attempt > MOST_ATTEMPTS:
            raise KCacheError(
                f"{MOST_ATTEMPTS} workers have died of the same prompts (batch {number}); memory is the likely reason: "
                "use fewer workers, a smaller --batch-size or a shorter --ctx"
            )
        return attempt


@dataclass(frozen=True)
class Planning:
    """A plan to be made where a worker will run."""

    engine: Any
    model: ModelOptions
    policy: Policy
    wanted: dict[str, Any]

    def __call__(self) -> Plan | KCacheError:
        """Make it; a refusal is returned."""
        try:
            plan: Plan = self.engine.plan(self.model, self.policy, **self.wanted)
        except KCacheError as error:
            return error
        return plan


def pack(work: Any) -> str:
    """A batch of prompts as a value for Ray."""
    return json_line([[item.entry.line, item.entry.id, item.ids] for item in work])


def unpack(packed: str) -> list[Work]:
    """A batch of prompts again; their text has stayed behind."""
    return [Work(Entry(line, name, ""), ids) for line, name, ids in json.loads(packed)]


def results_of(told: str) -> tuple[int, list[Result]]:
    """What a worker has told of a batch: which attempt it was, and the results.

    Raises
    ------
    KCacheError
        If it could not run it.
    """
    value = json.loads(told)
    if "problem" in value:
        kind, message = value["problem"]
        raise getattr(errors, kind, KCacheError)(message)
    return int(value["attempt"]), value["results"]


def _described(error: Exception) -> tuple[str, str]:
    if isinstance(error, KCacheError):
        return type(error).__name__, str(error)
    kind = DoesNotFitError if exits.exit_code(error) == exits.DOES_NOT_FIT else KCacheError
    return kind.__name__, f"on a worker: {exits.describe(error)}"


def _within(policy: Policy, gpus: float) -> Policy:
    """The policy, kept to a worker's part of a GPU that it shares: what is free there is not all its own."""
    if not 0 < gpus < 1 or policy.kv_budget is not None:
        return policy
    import torch

    total = int(torch.cuda.get_device_properties(0).total_memory * gpus)
    return policy.replace(kv_budget=max(0, total - torch.cuda.memory_allocated() - LEAST_RESERVE))
