"""What records a step and replays it: a CUDA graph, or whatever else keeps to the same rules.

The rules: a replay runs no Python of the step again, reads and writes the very memory that the recording did, and a
step that asks the host for a value (``.item()``, a shape that depends on data) cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_WARM_UPS = 2
"""Runs before the recording: kernels are compiled and scratch memory comes to its final size."""


class Tape(Protocol):
    """One recorded step."""

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        """Run ``step`` and record it; returns its result, which each replay writes anew."""
        ...

    def replay(self) -> None:
        """Do it again, behind what is already asked of the device; the host does not wait."""
        ...


class CudaTape:
    """A CUDA graph with memory of its own."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._device: torch.device | None = None

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        """See :class:`Tape`; the step runs before it is recorded, on the stream that records it."""
        self._device = device
        with torch.cuda.device(device):
            before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS):
                        step()
            finally:
                before.wait_stream(stream)
            torch.cuda.synchronize(device)
            try:
                # Other threads, such as a publisher's, may go on waiting for events of theirs.
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    return step()
            finally:
                torch.cuda.set_stream(before)  # a recording that fails leaves its own stream the current one

    def replay(self) -> None:
        """See :class:`Tape`."""
        with torch.cuda.device(self._device):
            self._graph.replay()


def tape_for(device: torch.device) -> Callable[[], Tape] | None:
    """What records steps on a device; None where nothing does."""
    made: Any = CudaTape if device.type == "cuda" else None
    return made
