"""``kcache tune`` at work: the search over rows that are kept as they come, the table, the profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kcache_cli.evaluate.flags import PlacesOptions, ResultOptions, check_context
from kcache_cli.options import ModelOptions

if TYPE_CHECKING:
    from kcache.evaluate.fidelity import Case
    from kcache.evaluate.figures import Figures
    from kcache.evaluate.haystack import Prose
    from kcache.evaluate.places import Place
    from kcache.evaluate.sweep import Spec
    from kcache.evaluate.tune import Goal, HeldPlaces, Search, Trial
    from kcache.policy import Policy
    from kcache_cli.rows.formats import Row
    from kcache_cli.rows.store import Store


@dataclass(frozen=True)
class Question:
    """What is looked for, on what, and where it goes."""

    model: ModelOptions
    sample: PlacesOptions
    goal: Goal
    base: Policy
    profile: Path
    results: ResultOptions


def answer(context: typer.Context, question: Question) -> None:
    """Search, print what was tried, write the profile.

    Raises
    ------
    KCacheError
        If nothing tried reaches the goal.
    """
    from kcache.evaluate.places import find_places
    from kcache.evaluate.shapes import find_shapes
    from kcache.evaluate.sweep import Spec
    from kcache.evaluate.tune import HeldPlaces, Search, topns_for
    from kcache_cli.engine import engine_of, load_with_bar
    from kcache_cli.evaluate.prose import read_prose
    from kcache_cli.evaluate.report import finish
    from kcache_cli.evaluate.tune_table import COMMAND, NAMES, markdown
    from kcache_cli.exits import note
    from kcache_cli.rows.store import Store

    sample, results, goal = question.sample, question.results, question.goal
    spec = Spec((), sample.ctx, sample.steps, sample.places)
    target, form, there = results.destination(COMMAND, NAMES)
    prose = read_prose(sample.text)
    engine = engine_of(context)
    check_context(engine, question.model, question.base, spec.ctx, f"{spec.steps} steps", spec.steps)
    lm = load_with_bar(engine, question.model)
    places = find_places(lm, prose, spec.ctx, spec.steps, spec.places)
    shapes = find_shapes(lm, question.base, spec.ctx, goal.device_overhead)
    book = _Book(lm, spec, prose, places, Store(target, form, markdown, there))
    desk = HeldPlaces(lm, places, spec.steps, note)
    search = Search(
        shapes,
        goal,
        len(places),
        lambda case, number: book.figures(desk, case, number),
        topns_for(spec.ctx),
        book.write,
    )
    best = None
    try:
        best = search.run()
    except KeyboardInterrupt:
        note("stopped; what has been measured is there" if target is not None else "stopped")
        raise
    finally:
        rows = book.close(search.trials, best)
    finish(book.store, markdown(rows))
    _conclude(search, rows, question)


class _Book:
    """What has been measured, now or before, as rows of a store."""

    def __init__(self, lm: Any, spec: Spec, prose: Prose, places: Sequence[Place], store: Store) -> None:
        from kcache.bench.env import surroundings
        from kcache_cli.evaluate.fidelity_table import identity

        self.store = store
        self._lm, self._spec, self._prose, self._places = lm, spec, prose, places
        self._env = surroundings(lm.device)
        self._before = [*store.rows]
        self._rows = {identity(row): row for row in store.rows}
        self._fresh: set[Case] = set()

    def figures(self, desk: HeldPlaces, case: Case, number: int) -> Figures:
        """A case's figures at a place: those that are there, or measured."""
        from kcache_cli.exits import note

        known = self._known(case).get(self._places[number].start)
        if known is None:
            self._fresh.add(case)
        figures = known or desk.measure(case, number)
        said = [
            case.label,
            f"place {number + 1}/{len(self._places)}",
            f"KL {sum(figures.kl) / len(figures.kl):.4f}",
            f"{figures.bytes_h2d_per_token / 1e6:.3f} MB/token",
        ]
        note(" · ".join(said if known is None else [*said, "was there already"]))
        return figures

    def write(self, trial: Trial) -> None:
        """Take a trial that has grown by a place, and write the file."""
        self._take(trial, chosen=False)
        self.store.replace([*self._rows.values()], lambda row: False)

    def close(self, trials: Sequence[Trial], best: Trial | None) -> list[Row]:
        """Mark the best, once the search has ended, and write everything; returns the rows of the search."""
        rows = [self._take(trial, chosen=trial is best) for trial in trials if trial.figures]
        self.store.rows = [*self._rows.values()]
        self.store.close()
        return rows

    def _known(self, case: Case) -> dict[int, Figures]:
        """A case's figures of before, by where a place starts."""
        from kcache.evaluate.sweep import make_row
        from kcache_cli.evaluate.fidelity_table import figures_there

        blank = make_row(self._lm, self._spec, self._prose, case, self._places, ())
        return {figures.start: figures for figures in figures_there(self._before, blank)}

    def _take(self, trial: Trial, chosen: bool) -> Row:
        """The row of a trial; what was known of a place that the trial did without stays in it."""
        from kcache.evaluate.sweep import make_row
        from kcache_cli.evaluate.fidelity_table import identity

        figures = self._known(trial.case) | {each.start: each for each in trial.figures}
        row = make_row(self._lm, self._spec, self._prose, trial.case, self._places, [*figures.values()])
        before = {} if trial.case in self._fresh else self._rows.get(identity(row), {})
        self._rows[identity(row)] = {
            **row,
            "target_kl": trial.goal.target_kl,
            "most_device_overhead": trial.goal.device_overhead,
            "reaches_target": trial.reaches,
            "chosen": chosen,
            "env": before.get("env", self._env),
        }
        return self._rows[identity(row)]


def _conclude(search: Search, rows: Sequence[Row], question: Question) -> None:
    """Write the profile, or say how close the closest came."""
    from kcache.errors import KCacheError
    from kcache_cli.evaluate.profile import write_profile
    from kcache_cli.exits import note

    best = search.best
    if best is None:
        closest = search.closest
        raise KCacheError(
            f"no policy tried comes within KL {question.goal.target_kl:g} of full attention; the closest is "
            f"{closest.case.label} at {closest.distance:.4f}; use a larger --target-kl or --device-overhead"
        )
    (row,) = [row for row in rows if row["chosen"]]
    write_profile(question.profile, best.case.policy, row)
    note(f"the cheapest is {best.case.label}; wrote {question.profile}, for --policy {question.profile}")
