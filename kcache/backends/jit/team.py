"""The threads that run a compiled region: torch's own.

A second pool of threads would fight torch's over the cores, since OpenMP's threads keep spinning for a while after
each operator. So a region is started with the very runtime that torch has loaded, through the entry point that
compilers emit for ``#pragma omp parallel``. Where the runtime has none by that name, a region runs on one thread.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Team:
    """How to start a region, and the addresses a region calls: its thread's number and a barrier (0 for one thread)."""

    parallel: Any | None = None
    number: int = 0
    barrier: int = 0

    def run(self, region: int, data: int, threads: int) -> None:
        """Run the compiled region at address ``region`` over ``data`` on so many threads, and wait for all of them."""
        if self.parallel is None or threads == 1:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(region)(data)
        else:
            self.parallel(region, data, threads, 0)

    @property
    def threads(self) -> int:
        """Threads a region may use now."""
        return 1 if self.parallel is None else torch.get_num_threads()


@lru_cache
def find_team() -> Team:
    """The team of the OpenMP runtime in this process."""
    try:
        process = ctypes.CDLL(None)
        parallel, number, barrier = process.GOMP_parallel, process.omp_get_thread_num, process.GOMP_barrier
    except (AttributeError, OSError, TypeError):
        return Team()
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return Team(parallel, _address(number), _address(barrier))


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
