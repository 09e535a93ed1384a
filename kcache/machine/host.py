"""What the host is: versions, CPU instructions, NUMA nodes, memory limits. Read from the system, nothing is measured.

Everything that is not known on a platform is None or empty, never an error.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from kcache.machine.ram import read_ram

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
_NODES = Path("/sys/devices/system/node")
_CPUINFO = Path("/proc/cpuinfo")
_DRIVER = Path("/proc/driver/nvidia/version")
_PCI = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class NumaNode:
    """A NUMA node: its number, CPUs as the kernel lists them (``0-15``), memory in bytes."""

    index: int
    cpus: str
    memory_bytes: int


@dataclass(frozen=True)
class Host:
    """The host's CPU and its memory limits.

    Attributes
    ----------
    cpu : str
    cores, threads : int
        Physical cores (logical ones where that is not known), and threads torch uses.
    flags : dict of str to bool
        Instruction sets that matter here.
    nodes : tuple of NumaNode
    memory_bytes, free_bytes : int
    locked_limit : int or None
        Most bytes an unprivileged process may lock (``ulimit -l``); None when unlimited or unknown.
    """

    cpu: str
    cores: int
    threads: int
    flags: dict[str, bool]
    nodes: tuple[NumaNode, ...]
    memory_bytes: int
    free_bytes: int
    locked_limit: int | None


def read_host() -> Host:
    """Read what there is to know."""
    memory = read_ram()
    return Host(
        cpu=cpu_name(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        threads=torch.get_num_threads(),
        flags=cpu_flags(),
        nodes=tuple(numa_nodes()),
        memory_bytes=memory.total,
        free_bytes=memory.available,
        locked_limit=locked_limit(),
    )


def versions() -> dict[str, str | None]:
    """Versions of what decides speed and correctness; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton", "accelerate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda, "driver": driver_version()}


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver; None where there is none."""
    match = re.search(r"Kernel Module(?: for \S+)?\s+([0-9]+\.[0-9.]+)", _text(_DRIVER))
    return match[1] if match else None


def cpu_name() -> str:
    """The CPU's name as it gives it."""
    match = re.search(r"^model name\s*:\s*(.+)$", _text(_CPUINFO), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_flags() -> dict[str, bool]:
    """Which of the instruction sets that matter are there; empty where the system does not say."""
    match = re.search(r"^flags\s*:\s*(.+)$", _text(_CPUINFO), re.MULTILINE)
    if match is None:
        return {}
    here = set(match[1].split())
    return {name: name in here for name in CPU_FLAGS}


def numa_nodes() -> list[NumaNode]:
    """The NUMA nodes, in order."""
    nodes = []
    for folder in _NODES.glob("node[0-9]*") if _NODES.is_dir() else ():
        match = re.search(r"MemTotal:\s+(\d+) kB", _text(folder / "meminfo"))
        memory = int(match[1]) * 1024 if match else 0
        nodes.append(NumaNode(int(folder.name.removeprefix("node")), _text(folder / "cpulist").strip(), memory))
    return sorted(nodes, key=lambda node: node.index)


def locked_limit() -> int | None:
    """``ulimit -l`` in bytes; None when there is no limit, or on systems without one."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True)
class PciSlot:
    """Where a GPU sits: its NUMA node, and the link as trained now and at best (``"16.0 GT/s x16"``)."""

    numa_node: int | None
    link: str | None
    best_link: str | None


def pci_slot(device: torch.device) -> PciSlot | None:
    """Where a CUDA device sits on the PCI bus; None where the system does not say."""
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:
        return None
    folder = _PCI / place
    if not folder.is_dir():
        return None
    node = _text(folder / "numa_node").strip()

    def link(kind: str) -> str | None:
        speed = _text(folder / f"{kind}_link_speed").strip().removesuffix(" PCIe")
        width = _text(folder / f"{kind}_link_width").strip()
        return f"{speed} x{width}" if speed and width else None

    return PciSlot(int(node) if node.isdigit() else None, link("current"), link("max"))


def cpus_near(device: torch.device | None) -> frozenset[int]:
    """CPUs of the NUMA node that a CUDA device is attached to; none where there is one node, or it is not known."""
    nodes = numa_nodes() if device is not None and device.type == "cuda" and torch.cuda.is_available() else []
    slot = pci_slot(device) if device is not None and len(nodes) > 1 else None
    found = [node.cpus for node in nodes if slot is not None and node.index == slot.numa_node]
    return frozenset(cpu for cpus in found for cpu in _cpu_list(cpus))


def _cpu_list(text: str) -> list[int]:
    """CPUs as the kernel lists them: ``0-2,5``."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
