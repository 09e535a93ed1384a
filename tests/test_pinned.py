"""Host memory for the device, with a driver that keeps to the rules of the real one: whole pages, each locked once."""

from __future__ import annotations

import gc
import mmap
from types import SimpleNamespace

import pytest
import torch

from kcache.errors import DoesNotFitError
from kcache.tiers import pinned
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


def test_a_refusal_says_what_to_do(driver: Driver) -> None:
    driver.refuse = 2
    with pytest.raises(DoesNotFitError, match=r"CUDA error 2.*ulimit -l"):
        pinned_empty((4, 4), torch.float32)


def test_more_than_is_free_is_not_tried(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux promises memory that it does not have, and kills who then writes to it."""
    monkeypatch.setattr(pinned.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(DoesNotFitError, match=r"3\.0 GiB of host memory and 0\.0 GiB are free"):
        pinned_empty((3, 2**30), torch.int8)
    assert not driver.locked
