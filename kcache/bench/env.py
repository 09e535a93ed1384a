"""Where and when something was measured: the stamp on every row."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

import kcache
from kcache.machine.host import cpu_name, versions
from kcache.speed.machine import Machine


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, threads and the time, as plain values."""
    host_only = device.type == "cpu"
    name = cpu_name() if host_only else torch.cuda.get_device_name(device)
    return _stamp(versions(), name, host_only)


def environment(machine: Machine) -> dict[str, Any]:
    """The same with measured bandwidths in GB/s."""
    return {
        **_stamp(machine.versions, machine.name, machine.host_only),
        "host_bytes": machine.host_bytes,
        "device_bytes": machine.device_bytes,
        "memory_gb_s": round(machine.memory_gb_s, 2),
        "h2d_gb_s": None if machine.h2d_gb_s is None else round(machine.h2d_gb_s, 2),
        "gather_gb_s": round(machine.gather_gb_s, 2),
    }


def _stamp(found: dict[str, str | None], device: str, host_only: bool) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kcache": kcache.__version__,
        **{name: version for name, version in found.items() if version is not None},
        "run": "host-only" if host_only else "device",
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
    }
