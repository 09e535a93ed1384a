"""The search for the cheapest policy: what it tries, when it stops, what it finds; the shapes it is given."""

from __future__ import annotations

import pytest

from kcache import Policy
from kcache.errors import InputError
from kcache.evaluate.fidelity import Case, measure
from kcache.evaluate.figures import Figures
from kcache.evaluate.haystack import Prose
from kcache.evaluate.places import find_places
from kcache.evaluate.shapes import Shape, find_shapes
from kcache.evaluate.tune import TOPNS, Goal, HeldPlaces, Search, topns_for
from tests.bench.machines import tiny

BASE = Policy(spread="even", dense_layers=1, dense_below=0, offload="all")
PROSE = Prose("numbers", " ".join(f"{number} is more than {number - 1}." for number in range(200)))
FEW = Shape("few", BASE.replace(dense_layers=4), layers=6)
ALL = Shape("all", BASE.replace(dense_layers=0), layers=10)


class Desk:
    """Measures by a formula: a shape needs so many rows for a KL of 0.01, times a factor at each place."""

    def __init__(self, needs: dict[str, float], hard: tuple[float, ...] = (1.0,), overhead: float = 0.05) -> None:
        self.needs, self.hard, self.overhead = needs, hard, overhead
        self.measured: list[tuple[str, int, int]] = []

    def __call__(self, case: Case, number: int) -> Figures:
        topn, layers = case.policy.topn, 10 - case.policy.dense_layers
        self.measured.append((case.name, topn, number))
        kl = 0.01 * self.needs[case.name] / topn * self.hard[number]
        return Figures(number, 2.0, 2.0, [kl, kl], 1.0, 0.9, topn, topn * layers * 8.0, self.overhead, [0.0] * 10)


def search(desk: Desk, *shapes: Shape, goal: Goal | None = None) -> Search:
    return Search(shapes, goal or Goal(0.01), len(desk.hard), desk)


@pytest.mark.parametrize("need", [1, 16, 17, 40, 64, 65, 700, 1024])
def test_the_fewest_rows_that_suffice_are_found_in_few_trials(need: int) -> None:
    desk = Desk({"all": need})
    best = search(desk, ALL).run()
    assert best is not None
    assert best.case.policy == ALL.policy.replace(topn=min(topn for topn in TOPNS if topn >= need))
    assert len(desk.measured) <= 5


def test_every_shape_finds_the_cheapest_of_all() -> None:
    for few in (20, 100, 160, 300, 5000):
        for order in ((ALL, FEW), (FEW, ALL)):
            best = search(Desk({"all": 64, "few": few}), *order).run()
            costs = {
                topn * shape.layers: (shape, topn)
                for shape, need in ((ALL, 64), (FEW, few))
                for topn in [next((topn for topn in TOPNS if topn >= need), None)]
                if topn is not None
            }
            shape, topn = costs[min(costs)]
            assert best is not None and best.shape is shape and best.case.policy.topn == topn


def test_a_shape_that_cannot_win_costs_one_measurement() -> None:
    desk = Desk({"all": 64, "few": 500}, hard=(1.0, 1.0))
    search(desk, ALL, FEW).run()
    # 64 rows of 10 layers: 96 of 6 are fewer, 112 are not
    assert [each for each in desk.measured if each[0] == "few"] == [("few", 96, 0)]
    desk = Desk({"all": 5000, "few": 16})
    search(desk, FEW, ALL).run()
    assert all(name == "few" for name, _, _ in desk.measured)


def test_a_trial_ends_at_the_place_that_decides_it() -> None:
    found = search(Desk({"all": 90}, hard=(1.0, 0.1, 0.1)), ALL)
    best = found.run()
    assert best is not None and best.case.policy.topn == 40  # 90 × 1.2 / 3 = 36
    assert best.distance == pytest.approx(0.01 * 36 / 40)
    places = {trial.case.policy.topn: (len(trial.figures), trial.reaches) for trial in found.trials}
    # 90 / 28 / 3 is more than 1; 90 / 32 / 3 is not, and 1.1 of it is
    assert places == {128: (3, True), 48: (3, True), 28: (1, False), 40: (3, True), 32: (2, False)}


def test_what_is_measured_to_take_too_much_of_the_device_is_no_answer() -> None:
    found = search(Desk({"all": 16}, overhead=0.08), ALL)
    assert found.run() is None
    assert search(Desk({"all": 16}, overhead=0.08), ALL, goal=Goal(0.01, 0.08)).run() is not None


def test_where_nothing_suffices_the_closest_is_known() -> None:
    found = search(Desk({"all": 5000, "few": 3000}, hard=(0.5, 1.5)), ALL, FEW)
    assert found.run() is None and found.best is None
    assert (found.closest.case.name, found.closest.case.policy.topn) == ("few", 1024)


def test_a_trial_is_told_each_time_it_grows() -> None:
    told: list[tuple[int, int, bool | None]] = []
    Search(
        [ALL], Goal(), 2, Desk({"all": 16}, (1.0, 1.0)), (16, 32),
        lambda trial: told.append((trial.case.policy.topn, len(trial.figures), trial.reaches)),
    ).run()  # fmt: skip
    assert told == [(32, 1, None), (32, 2, True), (16, 1, None), (16, 2, True)]


@pytest.mark.parametrize("wrong", [{"target_kl": 0.0}, {"target_kl": float("nan")}, {"device_overhead": -0.1}])
def test_a_goal_checks_itself(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be"):
        Goal(**wrong)


def test_n_is_less_than_the_rows_there_are() -> None:
    assert topns_for(7680) == TOPNS
    assert topns_for(100) == (16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96)
    assert topns_for(10) == (16,)


# -- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_hold_the_largest_tail_within_the_bound() -> None:
    lm = tiny(head_dim=64)
    wide = {shape.policy.dense_layers: shape for shape in find_shapes(lm, BASE, 1000, 1.0)}
    assert [*wide] == [1, 2, 0]  # the base first, and not all three layers
    assert [shape.layers for shape in wide.values()] == [2, 1, 3]
    assert all(shape.policy.tail_rank == 8 for shape in wide.values())
    # an eighth of V on all layers is 6.25 % of K and V; one layer of three is 16.7 %
    (narrow,) = find_shapes(lm, BASE, 1000, 0.07)
    assert (narrow.policy.dense_layers, narrow.policy.tail_rank, narrow.name) == (0, 8, "0 dense, tail of 8")
    (narrower,) = find_shapes(lm, BASE, 1000, 0.06)
    assert narrower.policy.tail_rank == 6
    (none,) = find_shapes(lm, BASE, 1000, 0.0)
    assert (none.policy.tail, none.policy.tail_rank, none.name) == ("renormalise", None, "0 dense, no tail")
    bare = find_shapes(lm, BASE.replace(tail="none"), 1000, 0.4)
    assert [shape.name for shape in bare] == ["1 dense, no tail", "2 dense, no tail", "0 dense, no tail"]


def test_shapes_that_cannot_be() -> None:
    lm = tiny()
    with pytest.raises(InputError, match="below 2,048 tokens the policy attends exactly"):
        find_shapes(lm, BASE.replace(dense_below=2048), 2047, 0.07)
    with pytest.raises(InputError, match="no number of dense layers stays within"):
        find_shapes(lm, BASE.replace(resident_layers=2), 1000, 0.01)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_a_shape_takes_is_what_is_measured(kind: str) -> None:
    """The bound a shape is held to beforehand and the figure that decides in the end are the same, to a step's rows."""
    lm = tiny(kind)
    (place,) = find_places(lm, PROSE, 300, 4, 1)
    for shape in find_shapes(lm, BASE, 300, 1.0):
        ((_, figures),) = measure(lm, place, 4, [shape.case(8)])
        assert find_shapes(lm, shape.policy, 300, figures.device_overhead * 1.01)[0].policy == shape.policy
        below = find_shapes(lm, shape.policy, 300, figures.device_overhead * 0.99)
        assert all(each.policy != shape.policy for each in below)


def test_a_place_is_prefilled_once_and_measures_what_fidelity_does() -> None:
    lm, said = tiny(), []
    places = find_places(lm, PROSE, 60, 6, 2)
    held = HeldPlaces(lm, places, 6, said.append)
    case = Case("it", BASE.replace(topn=4))
    again = [held.measure(case, number) for number in (1, 0, 1)]
    assert said == ["place 2/2 · prefill", "place 1/2 · prefill"]
    ((_, alone),) = measure(lm, places[1], 6, [case])
    assert again[0] == again[2] == alone and again[1].start == places[0].start
