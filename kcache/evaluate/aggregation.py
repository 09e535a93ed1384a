"""Tasks whose answer is spread over the whole context, after RULER (Hsieh et al., 2024): TopN is known to be weak here.

``common-words``: a numbered list of words in random order, ten of which appear 30 times each and the others 3 times;
which are the ten? ``variable-tracking``: a variable is given a value, four others are set from one another in turn,
all in prose; which variables have that value? A reply's score is the share of what it should name that it names.
"""

from __future__ import annotations

import random
import string
from itertools import pairwise
from typing import TYPE_CHECKING

from kcache.errors import InputError
from kcache.evaluate.haystack import Prose, count_tokens, passage, spread
from kcache.evaluate.needle import Problem

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
HOPS = 4


def common_words(lm: LoadedModel, prose: Prose, tokens: int, seed: str) -> Problem:
    """Make a list of words of the prose that fills ``tokens``; the more there is room for, the more different ones.

    Raises
    ------
    InputError
        If there is no room for the common words and as many others, or the prose has too few words.
    """
    draw = random.Random(seed)
    words = list(prose.words)
    draw.shuffle(words)
    common, others = words[:COMMON], words[COMMON:]
    introduction = "Below is a numbered list of words. Some of them appear more often than the others. Remember those."
    room = tokens - count_tokens(lm, f"{introduction}\n\n")

    def listed(count: int) -> str:
        words = common * COMMON_TIMES + others[:count] * OTHER_TIMES
        random.Random(seed).shuffle(words)
        return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))

    fits, too_many = COMMON, len(others) + 1
    if too_many <= fits or count_tokens(lm, listed(fits)) > room:
        raise InputError(
            f"common-words with {tokens:,} tokens: there is no room for {COMMON} words {COMMON_TIMES} times and others "
            f"{OTHER_TIMES} times, or the text has too few words; ask for a longer context"
        )
    while fits + 1 < too_many:
        middle = (fits + too_many) // 2
        if count_tokens(lm, listed(middle)) <= room:
            fits = middle
        else:
            too_many = middle
    question = f"Which {COMMON} words appear most often in the list above?"
    lead = f"The {COMMON} words that appear most often are: 1."
    return Problem(f"{introduction}\n\n{listed(fits)}", question, tuple(common), 96, lead)


def variable_tracking(lm: LoadedModel, prose: Prose, tokens: int, seed: str) -> Problem:
    """Hide a chain of assignments in prose, in order, spread over all of it."""
    draw = random.Random(seed)
    start = draw.random()
    value = str(draw.randrange(10_000, 100_000))
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    facts = [f"VAR {names[0]} = {value}."]
    facts += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
    depths = spread(len(facts), [draw.random() for _ in facts])
    introduction = (
        "Variables are assigned values in the following text. From VAR AAAAA = 10500 and VAR BBBBB = VAR AAAAA, for "
        "example, it follows that the variables with the value 10500 are AAAAA and BBBBB."
    )
    context = introduction + "\n\n" + passage(lm, prose, tokens, start, zip(depths, facts, strict=True))
    question = f"Which variables are assigned the value {value} in the text above, directly or through others?"
    lead = f"The {len(names)} variables with the value {value} are: VAR"
    return Problem(context, question, tuple(names), 64, lead)
