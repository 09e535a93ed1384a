"""What this machine can do per second: move bytes (:mod:`kcache.speed.bandwidth`), and compute.

These figures are what a decode step is held against (:mod:`kcache.planning.plan`): K and weights are read at the speed
of device memory, picked V rows arrive at the speed of the gather. On a machine without a CUDA device both tiers are
RAM, and nothing is said about a link.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from kcache.errors import InputError
from kcache.machine.devices import runs_kernels
from kcache.machine.host import cpu_name, versions
from kcache.machine.ram import read_ram
from kcache.models.arguments import with_cache
from kcache.speed.bandwidth import (
    GATHER_ROWS,
    LINK_SIZES,
    GatherSpeed,
    LinkSpeed,
    fast_s,
    gather_speeds,
    host_memory,
    link_speeds,
    memory_gb_s,
)
from kcache.speed.cards import LAYER_MS

__all__ = ["GatherSpeed", "LinkSpeed", "Machine", "measure"]

_LAYERS = 4


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
        Weights of one token's matrix products, read by torch's operators; None where that is taken to be as fast as
        memory, as on a GPU.
    layer_ms : float
        Time of one layer of a decode step beside reading its weights at that speed: what transformers and torch take
        for some dozens of small operators. Measured on a host-only machine; what cards are known to take, where our
        kernels run, and 0 on other GPUs.
    compute_tflops : float
        A large matrix product in bfloat16 or, where that is faster, in float16 on CUDA and float32 elsewhere.
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
    def product_gb_s(self) -> float:
        """What products with single rows read in a decode step: weights, K and V."""
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
    memory = read_ram()
    matvec: float | None = None
    layer_ms = 0.0
    least_s = 0.15 if quick else 0.6
    ram_copy, ram_read = memory_gb_s(torch.device("cpu"), 2**28, least_s)
    host_only = chosen.type == "cpu"
    table = host_memory(chosen, 2**28)
    gathers = tuple(gather_speeds(chosen, table, GATHER_ROWS[1:3] if quick else GATHER_ROWS, least_s))
    links: tuple[LinkSpeed, ...] = ()
    copy, read = ram_copy, ram_read
    if host_only:
        matvec, dtype = _matvec(least_s)
        layer_ms = _layer_ms(least_s, matvec, dtype)
    else:
        layer_ms = LAYER_MS if runs_kernels(chosen) else 0.0
        copy, read = memory_gb_s(chosen, 2**30, least_s)
        links = tuple(link_speeds(chosen, table, LINK_SIZES[-1:] if quick else LINK_SIZES, least_s))
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
        matvec_gb_s=matvec,
        layer_ms=layer_ms,
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


def _compute_tflops(device: torch.device, size: int, least_s: float) -> float:
    """Speed of a matrix product of two square matrices, in bfloat16 or, where that is faster, float16 or float32."""
    types = [torch.bfloat16, torch.float16 if device.type == "cuda" else torch.float32]
    best = 0.0
    for dtype in types:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        took = fast_s(partial(torch.mm, matrix, matrix), device, least_s)
        best = max(best, 2 * size**3 / took / 1e12)
    return best


def _matvec(least_s: float) -> tuple[float, torch.dtype]:
    """Bytes of weights that products with one row get through on the CPU, in GB/s, and in which of two types."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        row = torch.ones(1, 1024, dtype=dtype)
        weights = torch.ones(2**26 // (1024**2 * dtype.itemsize), 1024, 1024, dtype=dtype)
        took = fast_s(partial(_linears, row, weights), torch.device("cpu"), least_s)
        found.append((weights.numel() / took, weights.nbytes / took / 1e9, dtype))
    _, speed, dtype = max(found, key=lambda each: each[0])
    return speed, dtype


def _layer_ms(least_s: float, matvec_gb_s: float, dtype: torch.dtype) -> float:
    """Milliseconds per layer of a step of a small model on the CPU, less what reading its weights takes.

    Its layers are as wide as those of a real model: small products cost more than their bytes.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=_LAYERS,
        dtype=dtype,
    )
    with torch.random.fork_rng(devices=[]):  # the weights are drawn from the caller's generator
        model: Any = LlamaForCausalLM(config).eval()
    model.to(dtype)
    token = torch.zeros(1, 1, dtype=torch.int64)
    cache = DynamicCache(config=config)

    def step() -> None:
        model(token, **with_cache(model, cache))
        cache.crop(-1)

    with torch.inference_mode():
        model(torch.zeros(1, 16, dtype=torch.int64), **with_cache(model, cache))
        took_ms = fast_s(step, torch.device("cpu"), least_s) * 1e3
    weights_bytes = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    return max(0.0, took_ms - weights_bytes / matvec_gb_s / 1e6) / _LAYERS


def _linears(row: torch.Tensor, weights: torch.Tensor) -> None:
    for weight in weights:
        torch.nn.functional.linear(row, weight)
