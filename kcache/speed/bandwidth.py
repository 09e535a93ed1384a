"""How fast bytes move: within a memory, over the link in copies of a size, and as rows gathered one by one.

Bandwidths are 10^9 bytes per second. Of many repetitions nearly the fastest counts: other work on the machine only
ever makes a copy slower.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from kcache.errors import DoesNotFitError
from kcache.machine.devices import runs_kernels
from kcache.tiers.pinned import pinned_empty

ROW_BYTES = 256
LINK_SIZES = (2**12, 2**16, 2**20, 2**24, 2**26)
GATHER_ROWS = (512, 2048, 8192, 32768)


@dataclass(frozen=True)
class LinkSpeed:
    """Copies of ``size`` bytes between pinned host memory and the device, in GB/s."""

    size: int
    h2d_gb_s: float
    d2h_gb_s: float


@dataclass(frozen=True)
class GatherSpeed:
    """``rows`` scattered rows of 256 bytes fetched from the host tier in one go, in GB/s."""

    rows: int
    gb_s: float


def fast_s(call: Callable[[], object], device: torch.device, least_s: float) -> float:
    """Seconds of a fast call: of those made in ``least_s``, one in twenty is faster, on the device's own clock."""
    call()
    times: list[float] = []
    until = time.perf_counter() + least_s
    while len(times) < 3 or time.perf_counter() < until:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            call()
            end.record(torch.cuda.current_stream(device))
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return max(sorted(times)[len(times) // 20], 1e-9)


def memory_gb_s(device: torch.device, size: int, least_s: float) -> tuple[float, float]:
    """Copy and read bandwidth of a device's memory, over ``size`` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = fast_s(lambda: target.copy_(source), device, least_s)
    # On the CPU the dot product is the operator that keeps most loads in flight.
    read = fast_s(lambda: torch.dot(source, source) if device.type == "cpu" else source.sum(), device, least_s)
    return 2 * size / copy / 1e9, size / read / 1e9


def host_memory(device: torch.device, size: int) -> torch.Tensor:
    """Host memory ``[size]`` uint8; pinned for a CUDA device, if the driver agrees."""
    if device.type == "cuda":
        try:
            return pinned_empty((size,), torch.uint8).fill_(1)
        except DoesNotFitError:
            pass
    return torch.ones(size, dtype=torch.uint8)


def link_speeds(device: torch.device, host: torch.Tensor, sizes: tuple[int, ...], least_s: float) -> list[LinkSpeed]:
    """Copies between host memory and the device, in order on one stream; small ones are timed many at a time."""
    there = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def gb_s(target: torch.Tensor, source: torch.Tensor, size: int) -> float:
        count = max(1, min(64, 2**22 // size))

        def copies() -> None:
            for _ in range(count):
                target[:size].copy_(source[:size], non_blocking=True)

        return count * size / fast_s(copies, device, least_s) / 1e9

    return [LinkSpeed(size, gb_s(there, host, size), gb_s(host, there, size)) for size in sizes]


def gather_speeds(
    device: torch.device, host: torch.Tensor, counts: tuple[int, ...], least_s: float
) -> list[GatherSpeed]:
    """Gather rows that nobody has touched lately, out of a table larger than the caches."""
    table = host.view(torch.bfloat16).view(-1, ROW_BYTES // 2)
    places = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    gather = _gatherer(device, table)
    speeds = []
    for count in counts:
        batches = [places[first : first + count].to(device) for first in range(0, len(table) - count + 1, count)]
        calls = min(len(batches), max(8, 2**23 // (count * ROW_BYTES))) if device.type == "cuda" else 1
        turn = partial(_gather_next, gather, itertools.cycle(batches), calls)
        took = fast_s(turn, device, least_s)
        if device.type == "cpu":
            # On a busy machine threads wait for one another longer than a gather takes.
            with _one_thread():
                took = min(took, fast_s(turn, device, least_s))
        speeds.append(GatherSpeed(count, calls * count * ROW_BYTES / took / 1e9))
    return speeds


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gather_next(gather: Callable[[torch.Tensor], object], batches: Iterator[torch.Tensor], calls: int) -> None:
    for index in itertools.islice(batches, calls):
        gather(index)


def _gatherer(device: torch.device, host: torch.Tensor) -> Callable[[torch.Tensor], object]:
    """What fetches rows: torch on the CPU, a kernel that reads pinned memory on CUDA, or else the host for it."""
    if device.type == "cpu":
        return partial(torch.index_select, host, 0)
    if not (runs_kernels(device) and host.is_pinned()):
        return lambda index: host.index_select(0, index.cpu()).to(device)
    from kcache.speed.rowcopy import gather_rows

    out = torch.empty(max(GATHER_ROWS), host.shape[1], dtype=host.dtype, device=device)
    return lambda index: gather_rows(host, index, out)
