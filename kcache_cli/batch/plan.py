"""Which prompts are decoded together.

Batches are formed from the whole input, never from what is left to do, so a job that was stopped and continued runs
the same batches with the same seeds and writes the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kcache_cli.batch.families import families

_PADDING = 2048
"""Tokens of padding that are not worth another batch."""


@dataclass(frozen=True)
class Sizes:
    """How many prompts are decoded together at most: ``(tokens, prompts)``, by rising length with the answer."""

    steps: tuple[tuple[int, int], ...]

    def of(self, tokens: int) -> int:
        """The largest batch of prompts that take up to ``tokens`` with their answers."""
        return next((most for length, most in self.steps if length >= tokens), self.steps[-1][1])


def form_batches(prompts: Sequence[Sequence[int]], sizes: Sizes, new_tokens: int) -> list[list[int]]:
    """Group positions of prompts, given as tokens, by what they begin with and then by length; the longest first."""
    batches: list[list[int]] = []
    for family in families(prompts, new_tokens):
        lengths = [len(prompts[position]) for position in family]
        batches += [[family[place] for place in batch] for batch in make_batches(lengths, sizes, new_tokens)]
    return sorted(batches, key=lambda batch: -len(prompts[batch[0]]))


def make_batches(lengths: Sequence[int], sizes: Sizes, new_tokens: int = 0) -> list[list[int]]:
    """Group positions by length, longest first, as many at a time as that of the longest allows.

    Prompts of a batch are padded to its longest, so neighbours in length waste least, and those of less than half the
    longest's length begin the next batch, but for as many as take little padding together. The longest come first
    because a batch that does not fit should say so at once.
    """
    batches: list[list[int]] = []
    most = longest = left = 0
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        length = lengths[position]
        padding = longest - length if 2 * length < longest else 0
        if batches and len(batches[-1]) < most and padding <= left:
            batches[-1].append(position)
            left -= padding
        else:
            batches.append([position])
            most, longest, left = sizes.of(length + new_tokens), length, _PADDING
    return batches


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch: its own, and the same whenever the batch is run."""
    return seed * 2**20 + number
