"""Needles in a haystack: a fact hidden in prose at a known depth, and the question that asks for it.

``passkey`` hides one number. ``multikey`` hides :data:`KEYS` facts of one form that differ in what they are about, and
asks for one: the others are as likely as it to a model that only sees the form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kcache.evaluate.haystack import Prose, passage

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

KEYS = 4
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "silver")
_PLACES = ("lighthouse", "library", "harbour", "museum", "bakery", "theatre", "station", "castle")
_INTRODUCTION = "A few facts are hidden in the following text. Read it and remember them; I will ask you about them."


@dataclass(frozen=True)
class Problem:
    """A prompt in two parts, and what a right reply holds.

    Attributes
    ----------
    context : str
        What is prefilled.
    question : str
        What is fed by decode steps.
    answers : tuple of str
        A reply's score is the share of these that it holds as whole words.
    max_new_tokens : int
        Room for the reply.
    lead : str
        How the reply begins.
    stop : tuple of str
        Texts that end the reply.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    lead: str
    stop: tuple[str, ...] = ()


def passkey(lm: LoadedModel, prose: Prose, tokens: int, depth: float, seed: str) -> Problem:
    """Hide one number at ``depth`` of some ``tokens`` of prose."""
    draw = random.Random(seed)
    key = str(draw.randrange(10_000, 100_000))
    fact = f"The secret number is {key}. Remember it. {key} is the secret number."
    context = _INTRODUCTION + "\n\n" + passage(lm, prose, tokens, draw.random(), [(depth, fact)])
    return Problem(context, "What is the secret number?", (key,), 16, "The secret number is", stop=("\n",))


def multikey(lm: LoadedModel, prose: Prose, tokens: int, depth: float, seed: str) -> Problem:
    """Hide several numbers, the one that is asked for at ``depth`` and the others anywhere."""
    draw = random.Random(seed)
    start = draw.random()
    pairs = draw.sample([(colour, place) for colour in _COLOURS for place in _PLACES], KEYS)
    codes = [str(code) for code in draw.sample(range(10_000, 100_000), KEYS)]
    facts = [
        f"The access code of the {colour} {place} is {code}."
        for (colour, place), code in zip(pairs, codes, strict=True)
    ]
    depths = [depth, *(draw.random() for _ in range(KEYS - 1))]
    context = _INTRODUCTION + "\n\n" + passage(lm, prose, tokens, start, zip(depths, facts, strict=True))
    colour, place = pairs[0]
    question = f"What is the access code of the {colour} {place}?"
    lead = f"The access code of the {colour} {place} is"
    return Problem(context, question, (codes[0],), 16, lead, stop=("\n",))
