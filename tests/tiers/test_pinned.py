"""Host memory for the device, with a driver that keeps to the rules of the real one: whole pages, each locked once."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch

from kcache.errors import DoesNotFitError
from kcache.tiers import arena as arenas
from kcache.tiers.arena import Arena, mapped
from kcache.tiers.pinned import pinned_empty

ALREADY_REGISTERED = 712


class Driver:
    """cudaHostRegister and its opposite."""

    def __init__(self) -> None:
        self.locked: dict[int, range] = {}
        self.refuse = 0

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        if self.refuse:
            return self.refuse
        pages = range(pointer // mmap.PAGESIZE, -(-(pointer + size) // mmap.PAGESIZE))
        if any(pages.start < other.stop and other.start < pages.stop for other in self.locked.values()):
            return ALREADY_REGISTERED
        self.locked[pointer] = pages
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return driver


@pytest.mark.parametrize("shape", [(1,), (2, 3, 5, 7), (1, 8, 4096, 64), (3, 1_000_003)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_neighbours_share_no_page(driver: Driver, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [pinned_empty(shape, dtype) for _ in range(8)]
    for number, tensor in enumerate(tensors):
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert tensor.data_ptr() % mmap.PAGESIZE == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_memory_is_unregistered_with_the_last_view(driver: Driver) -> None:
    tensor = pinned_empty((4, 1000), torch.float32)
    view = tensor[1:].zero_()
    del tensor
    gc.collect()
    assert len(driver.locked) == 1
    assert view.sum() == 0
    del view
    gc.collect()
    assert not driver.locked


def test_nothing_to_hold_needs_no_driver(driver: Driver) -> None:
    driver.refuse = 1
    assert pinned_empty((0, 4), torch.float32).shape == (0, 4)


def test_a_refusal_says_what_to_do(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def zeros(*shape: int, device: object) -> torch.Tensor:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")  # what the driver kept of the refusal

    monkeypatch.setattr(torch, "zeros", zeros)
    driver.refuse = 2
    with pytest.raises(DoesNotFitError, match=r"CUDA error 2.*ulimit -l"):
        pinned_empty((4, 4), torch.float32)
    assert launched == ["cuda"], "the next launch of others must not find the error"


def test_more_than_is_free_is_not_tried(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux promises memory that it does not have, and kills who then writes to it."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40, available=2**20))
    with pytest.raises(DoesNotFitError, match=r"3\.0 GiB of host memory and 0\.0 GiB are free"):
        pinned_empty((3, 2**30), torch.int8)
    assert not driver.locked


# -- prepared ahead ------------------------------------------------------------------------------------------------

PIECES = [3 * 2**20, 3 * 2**20, 5000]


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[mmap.mmap]]:
    """Every mapping that is made."""
    made: list[weakref.ref[mmap.mmap]] = []

    class Mapping(mmap.mmap):  # one that can be referred to weakly
        pass

    def note(*arguments: int) -> mmap.mmap:
        memory = Mapping(*arguments)
        made.append(weakref.ref(memory))
        return memory

    names = {name: getattr(mmap, name) for name in dir(mmap) if name.isupper()}
    monkeypatch.setattr(arenas, "mmap", SimpleNamespace(**names, mmap=note))
    return made


def left(mappings: list[weakref.ref[mmap.mmap]]) -> int:
    """Mappings that are still there; threads that have just ended may hold theirs a moment longer."""
    for _ in range(200):
        gc.collect()
        if not any(memory() is not None for memory in mappings):
            return 0
        threading.Event().wait(0.01)
    return sum(memory() is not None for memory in mappings)


def test_pieces_of_an_arena_lie_apart_in_one_mapping(driver: Driver, mappings: list[weakref.ref[mmap.mmap]]) -> None:
    arena = Arena(torch.device("cpu"))
    arena.prepare(PIECES)
    tensors = [pinned_empty((size,), torch.uint8, arena=arena) for size in PIECES]
    assert len(mappings) == 1
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    assert sorted(driver.locked) == [tensor.data_ptr() for tensor in tensors]
    more = pinned_empty((100,), torch.uint8, arena=arena)
    assert len(mappings) == 2, "an arena that is used up is no hindrance"
    del tensors[0], tensor
    gc.collect()
    assert len(driver.locked) == 3
    del tensors, more
    assert left(mappings) == 0
    assert not driver.locked


def test_pages_are_there_when_a_piece_is_taken(driver: Driver) -> None:
    """Writing to them adds nothing to what the process holds."""
    arena = Arena(torch.device("cpu"))
    arena.prepare([64 * 2**20])
    tensor = pinned_empty((64 * 2**20,), torch.uint8, arena=arena)
    before = psutil.Process().memory_info().rss
    tensor.fill_(1)
    assert psutil.Process().memory_info().rss - before < 16 * 2**20


def test_memory_that_no_kernel_brings_in_is_there_all_the_same(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "_POPULATE_WRITE", 9999)  # EINVAL, as before Linux 5.14
    assert bool((pinned_empty((3 * 2**20,), torch.uint8) == 0).all())
    monkeypatch.setattr(arenas, "_madvise", lambda: None)
    assert bool((pinned_empty((3 * 2**20,), torch.uint8) == 0).all())


def test_an_arena_dropped_while_threads_work_leaves_nothing(
    driver: Driver, mappings: list[weakref.ref[mmap.mmap]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    brought: list[int] = []

    def slow(memory: mmap.mmap, start: int, size: int) -> None:
        begun.set()
        go.wait(10)
        brought.append(start)

    monkeypatch.setattr(arenas, "_bring_in", slow)
    monkeypatch.setattr(arenas.os, "cpu_count", lambda: 2)
    arena = Arena(torch.device("cpu"))
    arena.prepare([2**20 * 200])
    assert begun.wait(10)
    arena.drop()
    gc.collect()
    go.set()
    assert left(mappings) == 0
    assert brought == [0], "what had not begun was not done"


def test_a_piece_that_is_refused_leaves_nothing(driver: Driver, mappings: list[weakref.ref[mmap.mmap]]) -> None:
    arena = Arena(torch.device("cpu"))
    arena.prepare(PIECES)
    driver.refuse = 2
    with pytest.raises(DoesNotFitError, match="CUDA error 2"):
        pinned_empty((PIECES[0],), torch.uint8, arena=arena)
    del arena
    assert left(mappings) == 0


def test_an_arena_larger_than_what_is_free_is_none(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40, available=2**22))
    arena = Arena(torch.device("cpu"))
    arena.prepare([2**22, 2**22])
    assert arena.take(2**22) is None
    assert pinned_empty((100,), torch.uint8, arena=arena).shape == (100,)
    assert mapped(100)


def test_nothing_to_prepare(driver: Driver) -> None:
    arena = Arena(torch.device("cpu"))
    arena.prepare([])
    assert arena.take(100) is None
