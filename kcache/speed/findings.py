"""What a machine lacks for the fast path, and the way out of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from kcache.machine.devices import driver_problem, is_rocm, is_too_old
from kcache.machine.host import Host, PciSlot
from kcache.models.support import untried
from kcache.speed.machine import Machine

_SMALL_LOCK = 2**30
_SLOW_LINK_GB_S = 10.0
_RAISE_THE_LIMIT = (
    "raise the locked-memory limit: memlock in /etc/security/limits.conf, or for a shell, or for a container",
    ("ulimit -l unlimited", "docker run --ulimit memlock=-1 ..."),
)


@dataclass(frozen=True)
class Finding:
    """Something that costs speed.

    Attributes
    ----------
    level : {"missing", "note"}
        ``"missing"`` keeps the fast path from running; a ``"note"`` makes it slower, or may do so.
    what, way_out : str
    commands : tuple of str
        What to type for it, if there is such a thing.
    """

    level: Literal["missing", "note"]
    what: str
    way_out: str
    commands: tuple[str, ...] = ()


def findings(machine: Machine, host: Host, slot: PciSlot | None = None, load: float | None = None) -> list[Finding]:
    """List what is missing, the most costly first.

    Parameters
    ----------
    machine : Machine
    host : Host
    slot : PciSlot, optional
        Where the CUDA device sits.
    load : float, optional
        The system's load average; by default it is asked for.
    """
    found = _of_host_only(machine, host) if machine.host_only else _of_cuda(machine, host, slot)
    if machine.host_only and machine.threads < host.cores:
        found.append(
            Finding(
                "note",
                f"torch uses {machine.threads} of {host.cores} cores",
                "unset OMP_NUM_THREADS, or set it to the number of cores",
            )
        )
    if (newer := untried(machine.versions.get("transformers"))) is not None:
        found.append(Finding("note", newer[0], "should something fail, go back with", (newer[1],)))
    if (busy := how_busy(host.cores, load)) is not None:
        found.append(Finding("note", busy, "measure again when it is not"))
    return found


def _of_host_only(machine: Machine, host: Host) -> list[Finding]:
    if torch.cuda.is_available():
        what, way_out = "the CPU was asked for, and there is a CUDA device", "leave --device away"
    elif machine.versions.get("cuda") is None:
        what = "no CUDA device: this torch is built without CUDA"
        way_out = "on a machine with an NVIDIA GPU, install torch from its CUDA wheels"
    elif machine.versions.get("driver") is None:
        what, way_out = "no CUDA device: there is no NVIDIA driver", "install the driver, or run where there is a GPU"
    else:
        what = "no CUDA device is visible to torch"
        way_out = "look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this torch"
    found = [Finding("missing", f"{what}; both tiers are RAM and nothing crosses a link", way_out)]
    if host.flags and not (host.flags.get("avx512_bf16") or host.flags.get("amx_bf16")):
        found.append(
            Finding(
                "missing",
                "the CPU has no bfloat16 instructions (avx512_bf16, amx_bf16): bfloat16 models run slowly",
                "use --dtype float32",
            )
        )
    return found


def _of_cuda(machine: Machine, host: Host, slot: PciSlot | None) -> list[Finding]:
    found = [_of_kernels(machine), _of_pinning(machine, host), *_of_link(machine, host, slot)]
    return [finding for finding in found if finding is not None]


def _of_kernels(machine: Machine) -> Finding | None:
    device = torch.device(machine.device)
    if is_rocm():
        return Finding(
            "missing",
            f"{machine.name} runs by ROCm, kernels are made for NVIDIA cards: decode steps run in torch operators and "
            "wait for the host",
            "take a card of NVIDIA's, Ampere or newer; or --offload none, where the context fits",
        )
    if is_too_old(device):
        major, minor = torch.cuda.get_device_capability(device)
        return Finding(
            "missing",
            f"{machine.name} has compute capability {major}.{minor}, kernels need 8.0: decode steps run in torch "
            "operators and wait for the host, bfloat16 models run slowly",
            "use --dtype float16; for the kernels, take a card of the Ampere generation or newer",
        )
    if machine.versions.get("triton") is None:
        return Finding(
            "missing",
            "triton is not installed: decode steps run in torch operators and wait for the host",
            "install it with",
            ("pip install 'kcache-llm[gpu]'",),
        )
    if problem := driver_problem():
        return Finding(
            "missing",
            f"triton cannot be used: decode steps run in torch operators and wait for the host ({problem})",
            "it wants a C compiler and Python's headers: on Debian and Ubuntu",
            ("apt install gcc python3-dev",),
        )
    return None


def _of_pinning(machine: Machine, host: Host) -> Finding | None:
    if machine.pinned is False:
        return Finding("missing", "the driver refused to pin host memory: V cannot be offloaded", *_RAISE_THE_LIMIT)
    if host.locked_limit is not None and host.locked_limit < _SMALL_LOCK:
        limit = f"{host.locked_limit / 2**20:.0f} MiB"
        why = "the driver pinned 256 MiB all the same; more may be refused"
        return Finding("note", f"the locked-memory limit is {limit}: {why}", *_RAISE_THE_LIMIT)
    return None


def _of_link(machine: Machine, host: Host, slot: PciSlot | None) -> list[Finding]:
    found = []
    if slot is not None and slot.link and slot.best_link and slot.link != slot.best_link:
        found.append(
            Finding(
                "note",
                f"the PCIe link runs at {slot.link} of {slot.best_link}",
                "idle links are slowed down to save power; if it stays so under load, look at the slot and the riser",
            )
        )
    if machine.h2d_gb_s is not None and machine.h2d_gb_s < _SLOW_LINK_GB_S:
        found.append(
            Finding(
                "note",
                f"the link is slow: {machine.h2d_gb_s:.1f} GB/s from pinned memory",
                "keep more V on the device (--kv-budget), or fetch less (--topn)",
            )
        )
    node = None if slot is None else slot.numa_node
    if node is not None and len(host.nodes) > 1:
        found.append(
            Finding(
                "note",
                f"{len(host.nodes)} NUMA nodes, and the GPU is on node {node}",
                "run on the GPU's node with",
                (f"numactl --cpunodebind={node} --membind={node} kcache ...",),
            )
        )
    return found


def how_busy(cores: int, load: float | None = None) -> str | None:
    """Say so where the load average (the present one) is so high that measurements are of other work, too."""
    load = current_load() if load is None else load
    return f"the machine is busy (load {load:.1f} on {cores} cores)" if load > cores * 0.75 else None


def current_load() -> float:
    """The system's load average over a minute; 0 where it has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
