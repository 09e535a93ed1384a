"""What records a step and replays it: a CUDA graph, or whatever else keeps to the same rules.

The rules: a replay runs no Python of the step again, reads and writes the very memory that the recording did, and a
step that asks the host for a value (``.item()``, a shape that depends on data) cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, Protocol

import torch

_WARM_UPS = 2
"""Runs before the recording: kernels are compiled and scratch memory comes to its final size."""


class Tape(Protocol):
    """One recorded step."""

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        """Run ``step`` at least once, then record it; returns its result, which each replay writes anew.

        The first run may wait for the device: it is where trials are made.
        """
        ...

    def replay(self) -> None:
        """Do it again, behind what is already asked of the device; the host does not wait."""
        ...


class CudaTape:
    """A CUDA graph with memory of its own.

    A step that asks the host for a value is found out in the last run before the capture: one that fails leaves torch's
    allocator and generator as if it went on. What fails in the capture all the same is undone.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._device: torch.device | None = None

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        """See :class:`Tape`; the step runs before it is recorded, on the stream that records it."""
        self._device = device
        with torch.cuda.device(device):
            before, stream = torch.cuda.current_stream(device), _recording_stream(device)
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS - 1):
                        step()
                    with _no_synchronising():
                        step()
            finally:
                before.wait_stream(stream)
            torch.cuda.synchronize(device)
            # Other threads, such as a publisher's, may go on waiting for events of theirs.
            with (
                _undone_on_failure(device, before) as pool,
                torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                return step()

    def replay(self) -> None:
        """See :class:`Tape`."""
        with torch.cuda.device(self._device):
            self._graph.replay()


@lru_cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: torch keeps scratch memory of matrix products for every stream there was."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_synchronising() -> Iterator[None]:
    """Inside this block, an operation that makes the host wait for the device raises ``RuntimeError``."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _undone_on_failure(device: torch.device, before: torch.cuda.Stream) -> Iterator[Any]:
    """Give a capture its memory pool; if it fails, do what torch leaves undone when it cannot end a capture."""
    pool = torch.cuda.graph_pool_handle()
    try:
        yield pool
    except BaseException:
        torch.cuda.set_stream(before)  # the stream of the capture is still the current one
        _recording_stream.cache_clear()
        index = torch.cuda.current_device() if device.index is None else device.index
        with suppress(RuntimeError):  # raised where the capture did end, or never began
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # the copy is not being captured
        raise


def tape_for(device: torch.device) -> Callable[[], Tape] | None:
    """What records steps on a device; None where nothing does."""
    made: Any = CudaTape if device.type == "cuda" else None
    return made
