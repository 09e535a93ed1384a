"""Where and when something was measured: the stamp on every row."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

import kcache
from kcache.host import cpu_name
from kcache.machine import Machine


def environment(machine: Machine) -> dict[str, Any]:
    """Versions, hardware, threads, measured bandwidths in GB/s, and the time, as plain values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kcache": kcache.__version__,
        **{name: version for name, version in machine.versions.items() if version is not None},
        "run": "host-only" if machine.host_only else "device",
        "device": machine.name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "host_bytes": machine.host_bytes,
        "device_bytes": machine.device_bytes,
        "memory_gb_s": round(machine.memory_gb_s, 2),
        "h2d_gb_s": None if machine.h2d_gb_s is None else round(machine.h2d_gb_s, 2),
        "gather_gb_s": round(machine.gather_gb_s, 2),
    }
