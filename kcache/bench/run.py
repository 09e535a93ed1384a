"""Running a benchmark: case after case, within a case the engines in turn, and whatever fails becomes a row.

Engines take turns, in an order that moves on by one each time, so that a machine that slows down slows all of them and
the ratio holds. Their caches are held side by side where they fit together; otherwise each is made anew for its turn.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kcache.bench.cases import Case
from kcache.bench.context import LayerShape, layer_shapes
from kcache.bench.engines import Engine
from kcache.bench.fidelity import Fidelity, measure_fidelity
from kcache.bench.floor import Bandwidths
from kcache.bench.report import Problem, make_rows
from kcache.bench.rows import Row
from kcache.bench.runner import Runner
from kcache.bench.spec import Spec
from kcache.machine.ram import read_ram
from kcache.tiers.spare import spare_of

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel


class Watch(Protocol):
    """Told what is under way; ``turns`` is 1 when a turn has ended, see :func:`turns_of`."""

    def __call__(self, label: str, turns: int) -> None:
        """Take note."""


_SHARE_OF_FREE = 0.8
_LEAST_ROUNDS = 2


def turns_of(case: Case, spec: Spec) -> int:
    """How many turns a case has, fidelity counting as one of each engine's."""
    return len(case.engines) * (spec.repeats + spec.fidelity)


def run(
    lm: LoadedModel,
    spec: Spec,
    cases: Sequence[Case],
    machine: Bandwidths,
    env: dict[str, Any] | None = None,
    watch: Watch = lambda label, turns: None,
) -> Iterator[list[Row]]:
    """Measure ``cases``, yielding the rows of each, one per engine, as soon as it is done.

    Parameters
    ----------
    lm : LoadedModel
    spec : Spec
    cases : sequence of Case
        All or some of :func:`~kcache.bench.cases.make_cases`.
    machine : Machine
        Measured bandwidths, for the floor.
    env : dict, optional
        Stamped on every row.
    watch : callable, optional

    Raises
    ------
    UnsupportedModelError
        If the model's context can neither be filled in nor run.
    """
    shapes = layer_shapes(lm.model)
    for case in cases:
        yield _Race(lm, spec, case, shapes, watch).rows(machine, env or {})


class _Race:
    """One case."""

    def __init__(self, lm: LoadedModel, spec: Spec, case: Case, shapes: list[LayerShape], watch: Watch) -> None:
        self.lm, self.spec, self.case, self.shapes, self.watch = lm, spec, case, shapes, watch
        self.problems: dict[Engine, Problem] = {}
        self.runners: dict[Engine, Runner] = {}

    def rows(self, machine: Bandwidths, env: dict[str, Any]) -> list[Row]:
        """Measure and report."""
        for engine in self.case.engines:
            problem = self._known_problem(engine)
            if problem is not None:
                self.problems[engine] = problem
        together = self._fit_together()
        self._race(together)
        late = [self.problems[engine] for engine in self.runners if engine in self.problems]
        if together and any(problem.status == "does not fit" for problem in late):
            self._race(together=False)
        fidelity = self._fidelity() if self.spec.fidelity else {}
        measured = {engine: runner.measured for engine, runner in self.runners.items()}
        return make_rows(self.lm, self.spec, self.case, measured, self.problems, fidelity, machine, env)

    def _race(self, together: bool) -> None:
        """Give every engine its turns."""
        for engine in self.runners:
            self.problems.pop(engine, None)
        engines = [engine for engine in self.case.engines if engine not in self.problems]
        self.runners = {engine: Runner(self.lm, engine, self.case, self.spec, self.shapes) for engine in engines}
        began = time.perf_counter()
        try:
            for repeat in range(self.spec.repeats):
                limit = self.spec.case_s
                if limit is not None and repeat >= _LEAST_ROUNDS and time.perf_counter() - began > limit:
                    break
                shift = repeat % max(1, len(engines))
                for engine in engines[shift:] + engines[:shift]:
                    if engine not in self.problems:
                        self._take_turn(engine, together)
        finally:
            for runner in self.runners.values():
                runner.free()
            _tidy()

    def _take_turn(self, engine: Engine, together: bool) -> None:
        runner, label = self.runners[engine], f"{self.case.label} · {engine.label}"
        try:
            if not runner.alive:
                self.watch(f"{label}: context", 0)
                runner.prepare()
            self.watch(label, 0)
            runner.turn()
            self.watch(label, 1)
        except Exception as error:
            self.problems[engine] = self._too_long(error) or Problem.of(error)
            together = False
        if not together:
            runner.free()
            _tidy()

    def _too_long(self, error: Exception) -> Problem | None:
        """What an index out of range says of a model that has learned as many positions as its context has tokens."""
        known, wanted = self.lm.context_length, self.case.ctx + self.spec.new_tokens
        if not isinstance(error, IndexError) or known is None or wanted <= known:
            return None
        return Problem("too long", f"the model has {known:,} positions; context and timed steps take {wanted:,}")

    def _known_problem(self, engine: Engine) -> Problem | None:
        """What keeps an engine from running at all."""
        reason = engine.unavailable(self.lm.device)
        if reason is not None:
            return Problem("unavailable", reason)
        device, host = self._need(engine)
        free, ram = self._free()
        if device > free:
            where = "device memory" if self._on_cuda else "RAM"
            return Problem("does not fit", f"needs {_gib(device)} of {where}; {_gib(free)} are free")
        if host > ram:
            return Problem("does not fit", f"needs {_gib(host)} of RAM; {_gib(ram)} are free")
        return None

    def _fit_together(self) -> bool:
        """Whether the caches of all engines may be held at once.

        Not on CUDA when a policy asks for what the card has free: that would depend on the others.
        """
        policies = [engine.policy for engine in self.case.engines if engine.policy is not None]
        if self._on_cuda and any(policy.offload == "auto" for policy in policies):
            return False
        needs = [self._need(engine) for engine in self.case.engines if engine not in self.problems]
        device, host = (sum(part) for part in zip(*needs, strict=True)) if needs else (0, 0)
        free, ram = self._free()
        return device <= free * _SHARE_OF_FREE and host <= ram * _SHARE_OF_FREE

    @property
    def _on_cuda(self) -> bool:
        return self.lm.device.type == "cuda"

    def _need(self, engine: Engine) -> tuple[int, int]:
        """Bytes an engine takes on the device and in RAM; on a host-only run the device is RAM, and takes all."""
        device, host = engine.need(self.shapes, self.case.ctx + self.spec.new_tokens, self.case.batch)
        return (device, host) if self._on_cuda else (device + host, 0)

    def _free(self) -> tuple[int, int]:
        """Bytes free on the device and in RAM."""
        ram = read_ram().available + spare_of(self.lm.model).nbytes
        if not self._on_cuda:
            return ram, ram
        devices = {shape.device for shape in self.shapes}
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return sum(torch.cuda.mem_get_info(device)[0] for device in devices) + cached, ram

    def _fidelity(self) -> dict[Engine, Fidelity]:
        """KL and top-1 of the engines that do not read every row."""
        asked = [engine for engine in self.runners if engine.topn is not None and engine not in self.problems]
        if self.lm.context_length is not None and self.case.ctx > self.lm.context_length:
            return {}
        try:
            return measure_fidelity(self.lm, asked, self.case.ctx, partial(self.watch, turns=1))
        except Exception as error:
            for engine in asked:
                self.problems[engine] = Problem.of(error)
            return {}


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
