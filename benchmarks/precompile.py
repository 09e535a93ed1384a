"""Compile Triton kernels for a named GPU without one, through the very host code that launches them.

A stand-in driver names the target; launches compile (into Triton's cache on disk) and stop there. It serves the test
that compiles every kernel for sm_90, and benchmarks, which compile their variants in parallel before the clock starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class StandInDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The GPU compiled for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """There is one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0


@contextmanager
def compile_only(capability: int = 90, shard: int = 0, shards: int = 1) -> Iterator[list[tuple[str, Any]]]:
    """Let kernel launches compile only; gives the list of (name, compiled kernel) that fills as they happen.

    Of several ``shards`` each compiles every so many-th launch and passes over the others.
    """
    compiled: list[tuple[str, Any]] = []
    launch, numbers = JITFunction.run, itertools.count()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if next(numbers) % shards != shard:
            return None
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(StandInDriver(capability))
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        triton.runtime.driver._active = None
