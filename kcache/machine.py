"""What this machine can move per second: device memory, RAM, the link between them, and rows gathered one by one.

These figures are what a decode step is held against (:mod:`kcache.plan`): K and weights are read at the speed of device
memory, picked V rows arrive at the speed of the gather. On a machine without a CUDA device both tiers are RAM, and
nothing is said about a link.

Bandwidths are 10^9 bytes per second. Of many repetitions nearly the fastest counts: other work on the machine only
ever makes a copy slower.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import psutil
import torch

from kcache.errors import DoesNotFitError, InputError
from kcache.host import cpu_name, versions
from kcache.tiers.pinned import pinned_empty

ROW_BYTES = 256
LINK_SIZES = (2**12, 2**16, 2**20, 2**24, 2**26)
GATHER_ROWS = (512, 2048, 8192, 32768)
_TINY_LAYERS = 8


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


@dataclass(frozen=True)
class Machine:
    """A machine and its measured speeds.

    Attributes
    ----------
    device : str
        ``"cpu"``, or ``"cuda:0"``.
    name : str
        The device's product name.
    device_copy_gb_s, device_read_gb_s : float
        Device memory: bytes read and written per second by a large copy, and bytes read by a large sum. On a
        host-only machine they are RAM's.
    ram_copy_gb_s, ram_read_gb_s : float
        The same of RAM.
    h2d_gb_s, d2h_gb_s : float or None
        Large copies from and to pinned memory; None on a host-only machine.
    gather_gb_s : float
        Rows of 256 bytes gathered one by one from the host tier, as the engine does it.
    matvec_gb_s : float or None
        Weights of one token's matrix products, read by torch's operators with their overhead; None where that is taken
        to be as fast as memory, as on a GPU.
    layer_ms : float
        Time of one layer of a decode step whose arithmetic costs nothing: what transformers and torch take to get to
        it. Measured on a host-only machine; 0 on a GPU, where a step is one graph.
    compute_tflops : float
        A large matrix product in bfloat16 or, where that is faster, in float32.
    device_bytes, host_bytes, host_free_bytes : int
        Memory: the device's (RAM on a host-only machine), all RAM, RAM available now.
    threads : int
        Threads torch computes with on the CPU.
    versions : dict of str to str or None
        Of Python, torch, transformers, triton, accelerate, CUDA and the driver; None for what is not there.
    links, gathers
        Speeds by size; empty after a quick measurement.
    pinned : bool or None
        Whether the driver agreed to pin host memory; None on a host-only machine.
    """

    device: str
    name: str
    device_copy_gb_s: float
    device_read_gb_s: float
    ram_copy_gb_s: float
    ram_read_gb_s: float
    h2d_gb_s: float | None
    d2h_gb_s: float | None
    gather_gb_s: float
    compute_tflops: float
    device_bytes: int
    host_bytes: int
    host_free_bytes: int
    threads: int
    versions: dict[str, str | None] = field(default_factory=dict)
    links: tuple[LinkSpeed, ...] = ()
    gathers: tuple[GatherSpeed, ...] = ()
    pinned: bool | None = None
    matvec_gb_s: float | None = None
    layer_ms: float = 0.0

    @property
    def weights_gb_s(self) -> float:
        """Weights in a decode step of one token."""
        return self.matvec_gb_s or self.memory_gb_s

    @property
    def host_only(self) -> bool:
        """Whether both tiers are RAM."""
        return self.h2d_gb_s is None

    @property
    def memory_gb_s(self) -> float:
        """The fastest that device memory was seen to move bytes: what a decode step cannot beat."""
        return max(self.device_copy_gb_s, self.device_read_gb_s)


def measure(device: torch.device | str = "auto", quick: bool = True) -> Machine:
    """Measure this machine.

    Parameters
    ----------
    device : torch.device or str
        ``"auto"`` takes the first CUDA device, or the CPU.
    quick : bool
        Only the figures a plan needs, in two seconds; otherwise also the speeds by size.

    Raises
    ------
    InputError
        If the device is not there.
    """
    chosen = _device(device)
    memory = psutil.virtual_memory()
    least_s = 0.15 if quick else 0.6
    ram_copy, ram_read = _memory_gb_s(torch.device("cpu"), 2**28, least_s)
    host_only = chosen.type == "cpu"
    table = _host_memory(chosen, 2**28)
    gathers = tuple(_gathers(chosen, table, GATHER_ROWS[1:3] if quick else GATHER_ROWS, least_s))
    links: tuple[LinkSpeed, ...] = ()
    copy, read = ram_copy, ram_read
    if not host_only:
        copy, read = _memory_gb_s(chosen, 2**30, least_s)
        links = tuple(_links(chosen, table, LINK_SIZES[-1:] if quick else LINK_SIZES, least_s))
    return Machine(
        device=str(chosen),
        name=cpu_name() if host_only else torch.cuda.get_device_name(chosen),
        device_copy_gb_s=copy,
        device_read_gb_s=read,
        ram_copy_gb_s=ram_copy,
        ram_read_gb_s=ram_read,
        h2d_gb_s=max((link.h2d_gb_s for link in links), default=None),
        d2h_gb_s=max((link.d2h_gb_s for link in links), default=None),
        gather_gb_s=max(gather.gb_s for gather in gathers),
        compute_tflops=_compute_tflops(chosen, 1024 if host_only else 8192, least_s),
        device_bytes=memory.total if host_only else torch.cuda.mem_get_info(chosen)[1],
        host_bytes=memory.total,
        host_free_bytes=memory.available,
        threads=torch.get_num_threads(),
        versions=versions(),
        links=() if quick else links,
        gathers=() if quick else gathers,
        pinned=None if host_only else table.is_pinned(),
        matvec_gb_s=_matvec_gb_s(least_s) if host_only else None,
        layer_ms=_layer_ms(least_s) if host_only else 0.0,
    )


def _device(device: torch.device | str) -> torch.device:
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"not a device: {device!r}; use auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if chosen.type == "cuda" and torch.cuda.is_available() else 0
    if (chosen.index or 0) >= count:
        raise InputError(f"device {chosen}: torch sees {count} CUDA devices here; use cpu or auto")
    return torch.device("cuda", chosen.index or 0)


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


def _memory_gb_s(device: torch.device, size: int, least_s: float) -> tuple[float, float]:
    """Copy and read bandwidth of a device's memory, over ``size`` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = fast_s(lambda: target.copy_(source), device, least_s)
    # On the CPU the dot product is the operator that keeps most loads in flight.
    read = fast_s(lambda: torch.dot(source, source) if device.type == "cpu" else source.sum(), device, least_s)
    return 2 * size / copy / 1e9, size / read / 1e9


def _compute_tflops(device: torch.device, size: int, least_s: float) -> float:
    """Speed of a matrix product of two square matrices, in the faster of bfloat16 and float32."""
    types = [torch.bfloat16] if device.type == "cuda" else [torch.bfloat16, torch.float32]
    best = 0.0
    for dtype in types:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        took = fast_s(partial(torch.mm, matrix, matrix), device, least_s)
        best = max(best, 2 * size**3 / took / 1e12)
    return best


def _matvec_gb_s(least_s: float) -> float:
    """Weights that products with one row get through, on the CPU, in the faster of bfloat16 and float32."""
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        row = torch.ones(1, 1024, dtype=dtype)
        weights = torch.ones(2**26 // (1024**2 * dtype.itemsize), 1024, 1024, dtype=dtype)
        took = fast_s(partial(_linears, row, weights), torch.device("cpu"), least_s)
        best = max(best, weights.numel() * dtype.itemsize / took / 1e9)
    return best


def _layer_ms(least_s: float) -> float:
    """Milliseconds per layer of a step of a model too small for its arithmetic to count, on the CPU."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=_TINY_LAYERS
    )
    with torch.random.fork_rng(devices=[]):  # the weights are drawn from the caller's generator
        model = LlamaForCausalLM(config).eval()
    token = torch.zeros(1, 1, dtype=torch.int64)
    cache = DynamicCache(config=config)

    def step() -> None:
        model(token, past_key_values=cache)
        cache.crop(-1)

    with torch.inference_mode():
        model(torch.zeros(1, 16, dtype=torch.int64), past_key_values=cache)
        return fast_s(step, torch.device("cpu"), least_s) * 1e3 / _TINY_LAYERS


def _linears(row: torch.Tensor, weights: torch.Tensor) -> None:
    for weight in weights:
        torch.nn.functional.linear(row, weight)


def _host_memory(device: torch.device, size: int) -> torch.Tensor:
    """Host memory ``[size]`` uint8; pinned for a CUDA device, if the driver agrees."""
    if device.type == "cuda":
        try:
            return pinned_empty((size,), torch.uint8).fill_(1)
        except DoesNotFitError:
            pass
    return torch.ones(size, dtype=torch.uint8)


def _links(device: torch.device, host: torch.Tensor, sizes: tuple[int, ...], least_s: float) -> list[LinkSpeed]:
    """Copies between host memory and the device, in order on one stream; small ones are timed many at a time."""
    there = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def gb_s(target: torch.Tensor, source: torch.Tensor, size: int) -> float:
        count = max(1, min(64, 2**22 // size))

        def copies() -> None:
            for _ in range(count):
                target[:size].copy_(source[:size], non_blocking=True)

        return count * size / fast_s(copies, device, least_s) / 1e9

    return [LinkSpeed(size, gb_s(there, host, size), gb_s(host, there, size)) for size in sizes]


def _gathers(device: torch.device, host: torch.Tensor, counts: tuple[int, ...], least_s: float) -> list[GatherSpeed]:
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
    try:
        if not host.is_pinned():
            raise ImportError("a kernel reads pinned memory only")
        from kcache.rowcopy import gather_rows
    except ImportError:
        return lambda index: host.index_select(0, index.cpu()).to(device)
    out = torch.empty(max(GATHER_ROWS), host.shape[1], dtype=host.dtype, device=device)
    return lambda index: gather_rows(host, index, out)
