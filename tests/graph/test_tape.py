"""What a tape of CUDA graphs does around a capture, with a stand-in for torch.cuda: a failed one leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from kcache.machine import tape

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """Keeps the state that a capture changes, as torch does: what fails inside is not ended."""

    def __init__(self) -> None:
        self.pools: set[tuple[int, int]] = set()
        self.held: set[tuple[int, int]] = set()
        self.stream, self.sync_mode, self.capturing, self.made = "default", 0, False, 0

    def new_stream(self, device: torch.device) -> Any:
        self.made += 1
        return Stream(f"stream {self.made}")

    @contextmanager
    def graph(self, graph: Any, pool: tuple[int, int], stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.pools.add(pool)
        self.held.add(pool)
        self.capturing, before, self.stream = True, self.stream, stream
        yield
        self.pools.remove(pool)
        self.capturing, self.stream = False, before

    def end_allocate(self, index: int, pool: tuple[int, int]) -> None:
        if pool not in self.pools:
            raise RuntimeError("not recording to this pool")
        self.pools.remove(pool)

    def set_stream(self, stream: Any) -> None:
        self.stream = stream

    def set_mode(self, mode: Any) -> None:
        self.sync_mode = {"error": 2}.get(mode, mode)

    def set_state(self, state: Any) -> None:
        assert state == "a copy" and self.stream == "default stream"
        self.capturing = False


class Stream:
    """A stream's name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Any) -> None:
        """Order is not kept here."""

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


class Generator:
    """The device's generator."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.graphsafe_set_state = cuda.set_state

    def clone_state(self) -> str:
        return "a copy"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    fake.stream = Stream("default stream")  # type: ignore[assignment]
    instead = {
        "CUDAGraph": object, "device": lambda device: nullcontext(), "current_stream": lambda device: fake.stream,
        "Stream": fake.new_stream, "stream": lambda stream: nullcontext(), "synchronize": lambda device: None,
        "graph": fake.graph, "set_stream": fake.set_stream, "get_sync_debug_mode": lambda: fake.sync_mode,
        "set_sync_debug_mode": fake.set_mode, "graph_pool_handle": lambda: (0, 7),
        "default_generators": (Generator(fake),),
    }  # fmt: skip
    for name, value in instead.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: fake.held.remove(pool), raising=False)
    tape._recording_stream.cache_clear()
    yield fake
    tape._recording_stream.cache_clear()


def test_recordings_of_a_device_share_one_stream(cuda: FakeCuda) -> None:
    for _ in range(3):
        assert tape.CudaTape().record(lambda: torch.ones(1), DEVICE) == 1
    assert (cuda.made, cuda.sync_mode, str(cuda.stream)) == (1, 0, "default stream")
    assert cuda.held == {(0, 7)}, "a graph keeps its memory"


def test_a_step_that_asks_the_host_fails_before_the_capture(cuda: FakeCuda) -> None:
    modes = []

    def step() -> torch.Tensor:
        assert not cuda.capturing
        modes.append(cuda.sync_mode)
        if cuda.sync_mode:
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="synchronizing"):
        tape.CudaTape().record(step, DEVICE)
    assert modes == [0, 2]
    assert cuda.sync_mode == 0


def test_a_capture_that_fails_gives_allocator_and_generator_back(cuda: FakeCuda) -> None:
    def step() -> torch.Tensor:
        if cuda.capturing:
            raise ValueError("not while capturing")
        return torch.ones(1)

    with pytest.raises(ValueError, match="not while capturing"):
        tape.CudaTape().record(step, DEVICE)
    assert not cuda.capturing and not cuda.pools and not cuda.held
    assert str(cuda.stream) == "default stream"
    tape.CudaTape().record(lambda: torch.ones(1), DEVICE)
    assert cuda.made == 2, "a stream that was left in a capture is used no more"
