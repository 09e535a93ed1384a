"""Which prompts are decoded together.

Batches are formed from the whole input, never from what is left to do, so a job that was stopped and continued runs
the same batches with the same seeds and writes the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHORT = 512
"""Tokens up to which padding is not worth another batch."""


@dataclass(frozen=True)
class Sizes:
    """How many prompts are decoded together at most: ``(tokens, prompts)``, by rising length with the answer."""

    steps: tuple[tuple[int, int], ...]

    def of(self, tokens: int) -> int:
        """The largest batch of prompts that take up to ``tokens`` with their answers."""
        return next((most for length, most in self.steps if length >= tokens), self.steps[-1][1])


def make_batches(lengths: Sequence[int], sizes: Sizes, new_tokens: int = 0) -> list[list[int]]:
    """Group positions by length, longest first, as many at a time as that of the longest allows.

    Prompts of a batch are padded to its longest, so neighbours in length waste least, and one of less than half the
    longest's length begins the next batch, unless both are short. The longest come first because a batch that
    does not fit should say so at once.
    """
    batches: list[list[int]] = []
    most = 0
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        latest = batches[-1] if batches else []
        if latest and len(latest) < most and 2 * max(_SHORT, lengths[position]) >= lengths[latest[0]]:
            latest.append(position)
        else:
            batches.append([position])
            most = sizes.of(lengths[position] + new_tokens)
    return batches


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch: its own, and the same whenever the batch is run."""
    return seed * 2**20 + number
