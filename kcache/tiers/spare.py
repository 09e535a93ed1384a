"""Host memory that caches of a model have left, still registered, for its next cache.

Finding, zeroing and registering a GiB takes a third of a second, which every prompt of a batch job would pay again.
What a cache leaves is kept as long as the model is there, unless the next one needs pieces of other sizes, or RAM is
short.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

_KEY = "_kcache_spare"
_MOST_WASTE = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Registered memory: ``nbytes`` bytes at ``offset`` of a mapping, at ``pointer``, for ``device`` to read."""

    memory: mmap.mmap
    offset: int
    nbytes: int
    pointer: int
    device: torch.device | None

    def unregister(self) -> None:
        """Give it back, after the device has finished with it: a kernel's reads are invisible to torch's allocator."""
        torch.cuda.synchronize(self.device)
        torch.cuda.cudart().cudaHostUnregister(self.pointer)


class Spare:
    """What is kept for the next cache, whichever threads use and leave it."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._unsettled: set[torch.device | None] = set()
        self._lock = threading.RLock()  # a finaliser may come to keep something in the midst of anything
        weakref.finalize(self, _give_back, self._parts).atexit = False  # the system takes it back then

    def __deepcopy__(self, memo: dict[int, Any]) -> Spare:
        """An empty one: a copied model's caches have memory of their own."""
        return Spare()

    def __reduce__(self) -> tuple[type[Spare], tuple[()]]:
        """An empty one in another process, too."""
        return Spare, ()

    @property
    def nbytes(self) -> int:
        """Bytes of RAM it holds."""
        return sum(part.nbytes for part in self._parts)

    def keep(self, part: Part) -> None:
        """Keep what its device may still be reading."""
        with self._lock:
            self._parts.append(part)
            self._unsettled.add(part.device)

    def serves(self, sizes: Iterable[int], device: torch.device | None) -> bool:
        """Whether there is a part for each of so many bytes, for a device to read."""
        left = self._of(device)
        for size in sorted(sizes, reverse=True):
            found = _smallest(left, size)
            if found is None:
                return False
            left.remove(found)
        return True

    def take(self, nbytes: int, device: torch.device | None) -> Part | None:
        """A part of at least ``nbytes`` that ``device`` has read and reads no more, or None; the host waits once."""
        with self._lock:
            part = _smallest(self._of(device), nbytes)
            if part is None:
                return None
            self._parts.remove(part)
            if device in self._unsettled:
                self._unsettled.discard(device)  # first: what is kept meanwhile is waited for again
                torch.cuda.synchronize(device)
            return part

    def release(self, device: torch.device | None = None) -> None:
        """Give back to the system what ``device`` has read, or all."""
        with self._lock:
            parts = list(self._parts) if device is None else self._of(device)
            for part in parts:
                self._parts.remove(part)
        _give_back(parts)

    def _of(self, device: torch.device | None) -> list[Part]:
        return [part for part in self._parts if part.device == device]


def spare_of(model: Any) -> Spare:
    """What the caches of a model have left, kept with it."""
    found: Spare = vars(model).setdefault(_KEY, Spare())
    return found


def _smallest(parts: list[Part], nbytes: int) -> Part | None:
    fitting = [part for part in parts if nbytes <= part.nbytes <= _MOST_WASTE * nbytes]
    return min(fitting, key=lambda part: part.nbytes, default=None)


def _give_back(parts: list[Part]) -> None:
    while parts:
        parts.pop().unregister()
