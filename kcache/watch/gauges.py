"""What the machine says of its memory, read at most once a second: RAM, and a GPU's by NVML or the driver."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from kcache.machine.ram import read_ram
from kcache.watch.frame import Memory

_EVERY_S = 1.0


class Gauges:
    """Reads memory for one device.

    Parameters
    ----------
    device : torch.device
        That of the model's first weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._nvml: Any = _nvml_handle(device) if device.type == "cuda" else None
        self._read_s = -_EVERY_S
        self._memory = Memory()

    def read(self) -> Memory:
        """The latest reading; a new one when it is old."""
        now = time.monotonic()
        if now - self._read_s >= _EVERY_S:
            self._read_s, self._memory = now, self._look()
        return self._memory

    def _look(self) -> Memory:
        ram = read_ram()
        process = self._process.memory_info().rss
        if self._device.type != "cuda":
            return Memory(ram.total, ram.available, None, None, ram.total, ram.available, process)
        total, free = self._device_memory()
        return Memory(
            total,
            free,
            torch.cuda.memory_allocated(self._device),
            torch.cuda.memory_reserved(self._device),
            ram.total,
            ram.available,
            process,
        )

    def _device_memory(self) -> tuple[int, int]:
        if self._nvml is not None:
            import pynvml

            info: Any = pynvml.nvmlDeviceGetMemoryInfo(self._nvml)
            return int(info.total), int(info.free)
        free, total = torch.cuda.mem_get_info(self._device)
        return total, free


def _nvml_handle(device: torch.device) -> Any:
    """NVML's handle of a device; None where NVML is not there, and the driver is asked instead."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # the module, the library or the device may be missing; each has errors of its own
        return None
