"""Host memory for the V of a whole cache: one mapping, whose pages threads bring in ahead of use.

Registering memory with the driver first has to find and zero every page that was never touched, on the thread that
launches the model's kernels and one after another: 0.36 s a GiB. So the pages of all layers are brought in by other
threads from the moment that the cache knows how long it will be; the kernel does that without any lock of the driver.
Each layer then registers its part when it needs it. What the arena has no part for is a mapping of its own. Nothing is
brought in where an earlier cache has left as much.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any

import torch

from kcache.errors import DoesNotFitError
from kcache.machine.host import cpus_near
from kcache.machine.ram import read_ram
from kcache.tiers.spare import Spare

_HUGE_PAGE = 2 * 2**20
_PIECE = 16 * _HUGE_PAGE
_THREADS = 16
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which mmap does not name; Linux before 5.14 refuses it


class Arena:
    """Host memory of one cache for one device.

    Parameters
    ----------
    device : torch.device
        The one that will read it: pages are brought in by CPUs near it, which is where they then lie.
    spare : Spare or None
        What earlier caches have left.
    """

    def __init__(self, device: torch.device, spare: Spare | None = None) -> None:
        self.device, self.spare = device, spare
        self._pages: Pages | None = None
        self._taken = self._end = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Arena:
        """An empty one: a copied cache's memory is its own."""
        return Arena(self.device, self.spare)

    def prepare(self, sizes: Iterable[int]) -> None:
        """Begin to bring in memory for pieces of so many bytes; does nothing where that much is not free."""
        self.drop()
        wanted = [rounded(size) for size in sizes]
        if self.spare is not None:
            if self.spare.serves(wanted, self.device):
                return
            self.spare.release(self.device)
        total = sum(wanted)
        if total:
            try:
                self._pages, self._end = Pages(mapped(total), self.device), total
            except DoesNotFitError:  # each piece is then tried alone, and says so if it does not fit
                return

    def take(self, nbytes: int) -> tuple[mmap.mmap, int] | None:
        """The mapping and the offset of ``nbytes`` bytes whose pages are there; None where nothing is prepared."""
        if self._pages is None or self._taken + rounded(nbytes) > self._end:
            return None
        pages, start = self._pages, self._taken
        self._taken += rounded(nbytes)
        pages.wait(start, self._taken)
        if self._taken == self._end:
            self.drop()
        return pages.memory, start

    def drop(self) -> None:
        """Let go of what nobody has taken; the rest is there as long as its tensors are."""
        self._pages, self._taken, self._end = None, 0, 0


class Pages:
    """The pages of a mapping, being brought in by threads in order; those not yet begun are left when this is dropped.

    Parameters
    ----------
    memory : mmap.mmap
    device : torch.device or None
        Whose CPUs to do it on.

    Attributes
    ----------
    memory : mmap.mmap
    """

    def __init__(self, memory: mmap.mmap, device: torch.device | None = None) -> None:
        self.memory = memory
        self._pieces: list[Future[None]] = []
        cpus = os.cpu_count() or 1
        pool = ThreadPoolExecutor(max(1, min(_THREADS, cpus - 1)), "kcache-pages", partial(_stay_on, cpus_near(device)))
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        try:
            for start in range(0, len(memory), _PIECE):
                size = min(_PIECE, len(memory) - start)
                self._pieces.append(pool.submit(_bring_in, memory, start, size))
        except RuntimeError:  # no thread can be had: pages come when they are touched
            return

    def wait(self, start: int = 0, end: int | None = None) -> None:
        """Wait until the pages of the bytes ``start:end`` are there."""
        end = len(self.memory) if end is None else end
        wait(self._pieces[start // _PIECE : -(-end // _PIECE)])


def rounded(nbytes: int) -> int:
    """Bytes in whole pages, so that no two tensors share one: in huge pages from the size of one on."""
    page = mmap.PAGESIZE if nbytes < _HUGE_PAGE else _HUGE_PAGE
    return -(-nbytes // page) * page


def mapped(nbytes: int) -> mmap.mmap:
    """Return an anonymous mapping of at least ``nbytes``, in huge pages if the system has them.

    Raises
    ------
    DoesNotFitError
        If RAM for it is not free: the system would promise it all the same, and kill the process later.
    """
    size = rounded(nbytes)
    free = read_ram().available
    if size > free:
        raise DoesNotFitError(
            f"V needs {size / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are free; "
            "use a smaller context or batch"
        )
    try:
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise DoesNotFitError(f"could not allocate {size / 2**30:.1f} GiB of host memory for V: {error}") from error
    return memory


def _bring_in(memory: mmap.mmap, start: int, size: int) -> None:
    """Have the kernel map pages in; where it will not, they come when they are touched."""
    madvise = _madvise()
    if madvise is not None:
        madvise(ctypes.addressof(ctypes.c_char.from_buffer(memory, start)), size, _POPULATE_WRITE)


@cache
def _madvise() -> Any:
    """The C library's function: unlike mmap's it lets other threads run meanwhile. None where there is none."""
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def _stay_on(cpus: frozenset[int]) -> None:
    """Keep the calling thread on these CPUs, if that is allowed and there are any."""
    if cpus and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cpus)
        except OSError:
            return
