"""Which prompts are decoded together.

Batches are formed from the whole input, never from what is left to do, so a job that was stopped and continued runs
the same batches with the same seeds and writes the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORT = 512
"""Tokens up to which padding is not worth another batch."""


def make_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group positions by length, longest first, up to ``batch_size`` at a time.

    Prompts of a batch are padded to its longest, so neighbours in length waste least, and one of less than half the
    longest's length begins the next batch, unless both are short. The longest come first because a batch that
    does not fit should say so at once.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        latest = batches[-1] if batches else []
        if latest and len(latest) < batch_size and 2 * max(_SHORT, lengths[position]) >= lengths[latest[0]]:
            latest.append(position)
        else:
            batches.append([position])
    return batches


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch: its own, and the same whenever the batch is run."""
    return seed * 2**20 + number
