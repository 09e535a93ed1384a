"""The numbers that tune the kernels of a decode step."""

from __future__ import annotations

from dataclasses import dataclass

from kcache.backends.triton.common import Chip


@dataclass(frozen=True)
class Tuning:
    """Launch parameters; the results do not depend on them.

    Attributes
    ----------
    warps, residency : int
        Warps per program, and most programs per multiprocessor (fewer where shared memory says so).
    score_block, score_stages, score_splits : int
        Rows of K per tile (0 chooses by the size of a row), tiles in flight, programs per row of work (0 chooses).
    select_warps, select_tile : int
        Least warps of a program that selects for itself; how many rows select looks at in a step.
    gather_rows, weigh_tile : int
        Picked rows that are read, and that are weighed, at once (fewer where they are long, or many heads share them).
    tail_tile, tail_stages, tail_splits : int
        Rows of the tail per tile (fewer where many heads share them), tiles in flight, programs per row of work (0
        chooses).
    ahead : int
        Rows of work that are scored before the first one's tail is summed; 0 chooses by the size of the L2 cache.
    dense_block, dense_warps, dense_stages, dense_residency : int
        The same for the dense decode of resident layers; 0 chooses by size, of stages as well.
    chip : Chip or None
        What to plan for; None asks the device.
    """

    warps: int = 8
    residency: int = 2
    score_block: int = 0
    score_stages: int = 3
    score_splits: int = 0
    select_warps: int = 8
    select_tile: int = 1024
    gather_rows: int = 64
    weigh_tile: int = 128
    tail_tile: int = 512
    tail_stages: int = 3
    tail_splits: int = 0
    ahead: int = 0
    dense_block: int = 0
    dense_warps: int = 4
    dense_stages: int = 0
    dense_residency: int = 3
    chip: Chip | None = None
