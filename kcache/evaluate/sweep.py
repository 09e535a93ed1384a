"""A sweep of policies over places of a text: every policy at a place before the next, so each is prefilled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kcache.cache import settled
from kcache.errors import InputError
from kcache.evaluate.fidelity import Case, measure
from kcache.evaluate.figures import Figures, summary
from kcache.evaluate.haystack import Prose
from kcache.evaluate.places import Place

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel


@dataclass(frozen=True)
class Spec:
    """What to measure: cases, tokens prefilled, decode steps after them, and places in the text."""

    cases: tuple[Case, ...]
    ctx: int = 7680
    steps: int = 256
    places: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", tuple(dict.fromkeys(self.cases)))
        for name, least in (("ctx", 1), ("steps", 1), ("places", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


Known = Mapping[Case, Sequence[Figures]]


def left_at(spec: Spec, place: Place, known: Known) -> list[Case]:
    """The cases that have not been measured at a place."""
    return [case for case in spec.cases if all(figures.start != place.start for figures in known.get(case, ()))]


def turns_of(spec: Spec, places: Sequence[Place], known: Known) -> int:
    """How often :func:`run` will say that something begins."""
    left = [len(left_at(spec, place, known)) for place in places]
    return sum(count + 2 for count in left if count)


def run(
    lm: LoadedModel,
    spec: Spec,
    places: Sequence[Place],
    known: Known,
    watch: Callable[[str], None] = lambda label: None,
) -> Iterator[tuple[Case, Figures]]:
    """Measure what is not known yet, yielding a case's figures at a place as soon as they are.

    Parameters
    ----------
    lm : LoadedModel
    spec : Spec
    places : sequence of Place
        See :func:`~kcache.evaluate.places.find_places`.
    known : mapping
        Figures that each case has already.
    watch : callable
        Told what begins.
    """
    for number, place in enumerate(places, start=1):
        cases = left_at(spec, place, known)
        if not cases:
            continue
        yield from measure(lm, place, spec.steps, cases, partial(_begins, watch, f"place {number}/{len(places)}"))


def _begins(watch: Callable[[str], None], where: str, what: str) -> None:
    watch(f"{where} · {what}")


def make_row(
    lm: LoadedModel, spec: Spec, prose: Prose, case: Case, places: Sequence[Place], figures: Sequence[Figures]
) -> dict[str, Any]:
    """What is known of a case, as plain values: settings, the :func:`~kcache.evaluate.figures.summary`, each place.

    ``starts`` are the places asked for, ``places`` how many of them have been measured.
    """
    return {
        "model": lm.name,
        "text": prose.name,
        "text_sha256": prose.digest,
        "policy_name": case.name,
        "topn": case.policy.topn,
        "ctx": spec.ctx,
        "steps": spec.steps,
        "places": len(figures),
        **(summary(figures) if figures else {}),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "policy": settled(case.policy, lm.model).to_dict(),
        "starts": [place.start for place in places],
        "by_place": [each.to_dict() for each in sorted(figures, key=lambda each: each.start)],
    }
