"""Which prompts are decoded together.

Batches are formed from the whole input, never from what is left to do, so a job that was stopped and continued runs
the same batches with the same seeds and writes the same text.
"""

from __future__ import annotations

from collections.abc import Sequence


def make_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group positions by length, longest first, ``batch_size`` at a time.

    Prompts of a batch are padded to its longest, so neighbours in length waste least; the longest come first because
    a batch that does not fit should say so at once.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch: its own, and the same whenever the batch is run."""
    return seed * 2**20 + number
