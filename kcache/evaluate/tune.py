"""The cheapest policy that stays within a distance of full attention: a search over shapes and N.

Cost is what a decode step brings over the link, ``bytes_h2d_per_token`` as counted at the context measured at. What a
policy keeps on the device beside K (V of dense layers, the tail) is not weighed against it but bounded.

More rows lose less, so within a shape the fewest that suffice are found by bisection. A shape after the first begins
with the most rows at which it would still be cheaper than the best so far; if those do not suffice it is done with. A
policy is done with at the first place after which it cannot come to the target any more, whatever the others say:
KL is never negative.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kcache.errors import InputError
from kcache.evaluate.fidelity import Case, HeldPlace
from kcache.evaluate.figures import Figures
from kcache.evaluate.places import Place
from kcache.evaluate.shapes import Shape

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

TOPNS = (16, *(step * 2**power for power in range(2, 8) for step in (5, 6, 7, 8)))
"""16 to 1,024 in steps of a seventh to a quarter."""


@dataclass(frozen=True)
class Goal:
    """What a policy has to keep to.

    Attributes
    ----------
    target_kl : float
        Mean KL divergence from full attention, in nats, at most.
    device_overhead : float
        Bytes on the device beside K, as a share of a full KV cache, at most.
    """

    target_kl: float = 0.01
    device_overhead: float = 0.07

    def __post_init__(self) -> None:
        if not 0 < self.target_kl < math.inf:
            raise InputError(f"target_kl must be a number of nats above 0, got {self.target_kl}; 0.01 is close")
        if not 0 <= self.device_overhead <= 1:
            raise InputError(f"device_overhead must be a share from 0 to 1, got {self.device_overhead}; try 0.07")


@dataclass
class Trial:
    """A shape with an N, and its figures at the places it has been measured at."""

    shape: Shape
    case: Case
    goal: Goal
    places: int
    figures: list[Figures] = field(default_factory=list)

    @property
    def reaches(self) -> bool | None:
        """Whether the goal is reached at all places together; None while that is open."""
        total = sum(statistics.fmean(each.kl) for each in self.figures)
        if total / self.places > self.goal.target_kl:
            return False
        if any(each.device_overhead > self.goal.device_overhead for each in self.figures):
            return False
        return True if len(self.figures) == self.places else None

    @property
    def cost(self) -> tuple[float, float]:
        """Bytes over the link per token, then what is kept on the device."""
        return (
            statistics.fmean(each.bytes_h2d_per_token for each in self.figures),
            statistics.fmean(each.device_overhead for each in self.figures),
        )

    @property
    def distance(self) -> float:
        """Mean KL at the places measured."""
        return statistics.fmean(statistics.fmean(each.kl) for each in self.figures)


class HeldPlaces:
    """Places that are prefilled when first measured at, and held from then on: a search comes back to each of them.

    Parameters
    ----------
    lm : LoadedModel
    places : sequence of Place
    steps : int
    watch : callable
        Told what begins.
    """

    def __init__(
        self, lm: LoadedModel, places: Sequence[Place], steps: int, watch: Callable[[str], None] = lambda label: None
    ) -> None:
        self._lm, self._places, self._steps, self._watch = lm, places, steps, watch
        self._held: dict[int, HeldPlace] = {}

    def measure(self, case: Case, number: int) -> Figures:
        """Measure a case at place ``number``, from 0."""
        if number not in self._held:
            self._watch(f"place {number + 1}/{len(self._places)} · prefill")
            self._held[number] = HeldPlace(self._lm, self._places[number], self._steps)
        return self._held[number].beside(case.policy)


class Search:
    """The search.

    Parameters
    ----------
    shapes : sequence of Shape
        At least one, likely winners first.
    goal : Goal
    places : int
        How many places there are.
    measure : callable
        ``(case, number)`` to the figures of a case at place ``number``, from 0.
    topns : sequence of int
        N to choose from, ascending.
    tell : callable
        Given a trial each time it has been measured at a further place.

    Attributes
    ----------
    trials : list of Trial
        All that was tried, in order.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        goal: Goal,
        places: int,
        measure: Callable[[Case, int], Figures],
        topns: Sequence[int] = TOPNS,
        tell: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self.trials: list[Trial] = []
        self._shapes, self._goal, self._places, self._topns = shapes, goal, places, topns
        self._measure, self._tell = measure, tell

    @property
    def best(self) -> Trial | None:
        """The cheapest that reaches the goal, of those tried."""
        return min((trial for trial in self.trials if trial.reaches), key=lambda trial: trial.cost, default=None)

    @property
    def closest(self) -> Trial:
        """The one nearest to full attention, where none reaches the goal: of those measured at the most places."""
        return min(self.trials, key=lambda trial: (-len(trial.figures), trial.distance))

    def run(self) -> Trial | None:
        """Search; returns the best, None if nothing reaches the goal."""
        for shape in self._shapes:
            end = self._worth_trying(shape)
            if self.best is None:
                self._bisect(shape, end)
            elif end and self._reaches(shape, end - 1):
                self._bisect(shape, end - 1)
        return self.best

    def _worth_trying(self, shape: Shape) -> int:
        """How many of the N are few enough for the shape to be cheaper than the best so far."""
        best = self.best
        if best is None:
            return len(self._topns)
        cost = best.case.policy.topn * best.shape.layers
        return sum(topn * shape.layers < cost for topn in self._topns)

    def _bisect(self, shape: Shape, end: int) -> None:
        """Try down to the fewest rows that suffice, of the first ``end`` N."""
        low, high = 0, end
        while low < high:
            middle = (low + high) // 2
            if self._reaches(shape, middle):
                high = middle
            else:
                low = middle + 1

    def _reaches(self, shape: Shape, index: int) -> bool:
        """Measure a shape with an N, place by place, until it is known."""
        trial = Trial(shape, shape.case(self._topns[index]), self._goal, self._places)
        self.trials.append(trial)
        while trial.reaches is None:
            trial.figures.append(self._measure(trial.case, len(trial.figures)))
            self._tell(trial)
        return trial.reaches


def topns_for(ctx: int) -> tuple[int, ...]:
    """N to choose from after ``ctx`` tokens: fewer than there are rows."""
    return tuple(topn for topn in TOPNS if topn < ctx) or TOPNS[:1]
