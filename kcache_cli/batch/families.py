"""Which prompts ask about the same: what all of a batch begin with is read once (:mod:`kcache.decoding.prefix`)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kcache.decoding.prompts import LEAST_SHARED, alike

_STEP_TOKENS = 100
"""Tokens that are read in about the time of a decode step."""


def families(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Group positions of prompts: those that begin alike and are to have batches of their own, and last all others.

    A family begins alike for half of each prompt or more, and reading that once saves more than the decode steps of
    another batch take, of answers of up to ``new_tokens``.
    """
    # By their bytes, which compare faster than lists: any order does that puts together what begins alike.
    order = sorted(range(len(prompts)), key=lambda position: array("I", prompts[position]).tobytes())
    found: list[list[int]] = []
    others: list[int] = []
    family: list[int] = []
    shared = 0

    def close() -> None:
        pays = (len(family) - 1) * shared >= _STEP_TOKENS * new_tokens and len(family) > 1
        if pays:
            found.append(sorted(family))
        else:
            others.extend(family)

    for position in order:
        ids = prompts[position]
        common = alike(prompts[family[-1]], ids) if family else 0
        if family and common >= max(LEAST_SHARED, len(ids) // 2, len(prompts[family[-1]]) // 2):
            shared = min(shared, common)
            family.append(position)
            continue
        close()
        family, shared = [position], len(ids)
    close()
    return [*sorted(found), sorted(others)] if others else sorted(found)
