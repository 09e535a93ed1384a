"""Host memory that caches of a model have left, still registered, for its next cache.

Finding, zeroing and registering a GiB takes a third of a second, which every prompt of a batch job would pay again.
What a cache leaves is kept as long as the model is there, unless the next one needs pieces of other sizes, or RAM is
short.
"""

from __future__ import annotations

import mmap
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
    """What is kept for the next cache."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._unsettled = False
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
        """Keep what the device may still be reading."""
        self._parts.append(part)
        self._unsettled = True

    def serves(self, sizes: Iterable[int]) -> bool:
        """Whether there is a part for each of so many bytes."""
        left = list(self._parts)
        for size in sorted(sizes, reverse=True):
            found = _smallest(left, size)
            if found is None:
                return False
            left.remove(found)
        return True

    def take(self, nbytes: int) -> Part | None:
        """A part of at least ``nbytes`` that nobody reads any more, or None; the host waits for the device once."""
        part = _smallest(self._parts, nbytes)
        if part is None:
            return None
        if self._unsettled:
            torch.cuda.synchronize(part.device)
            self._unsettled = False
        self._parts.remove(part)
        return part

    def release(self) -> None:
        """Give everything back to the system."""
        _give_back(self._parts)


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
