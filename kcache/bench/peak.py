"""The most memory that was in use while something ran, over what was in use before."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Watches one stretch of work: device memory on CUDA, the process's resident memory elsewhere.

    Resident memory needs Linux, whose high-water mark can be reset; :meth:`added_bytes` is None where it cannot.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            self._before = _status("VmRSS") if _reset_mark() else None

    def added_bytes(self) -> int | None:
        """The peak since construction, over what was in use then."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return max(0, peak - self._before)


def _reset_mark() -> bool:
    """Give freed memory back to the system and set the high-water mark to what is in use now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return False
    return _STATUS.exists()


def _status(name: str) -> int:
    """Bytes of one line of the process's status, which Linux gives in KiB."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
