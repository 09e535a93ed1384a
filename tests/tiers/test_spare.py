"""Host memory that one cache leaves for the next: registered once, never two owners, given back with the model."""

from __future__ import annotations

import copy
import gc
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kcache import memory
from kcache.errors import DoesNotFitError
from kcache.tiers import arena as arenas
from kcache.tiers.arena import Arena
from kcache.tiers.pinned import pinned_empty
from kcache.tiers.spare import Spare, spare_of
from tests.tiers.test_pinned import Driver, driver, left, mappings

__all__ = ["driver", "mappings"]
SIZES = [3 * 2**20, 5 * 2**20, 5000]
CPU = torch.device("cpu")


def take(arena: Arena, sizes: list[int]) -> list[torch.Tensor]:
    arena.prepare(sizes)
    return [pinned_empty((size,), torch.uint8, arena=arena) for size in sizes]


def test_the_next_cache_takes_what_the_last_has_left(driver: Driver, mappings: list[object]) -> None:
    spare = Spare()
    tensors = take(Arena(CPU, spare), SIZES)
    places = sorted(tensor.data_ptr() for tensor in tensors)
    assert spare.nbytes == 0
    tensors.clear()
    gc.collect()
    assert spare.nbytes == sum(map(arenas.rounded, SIZES))
    again = take(Arena(CPU, spare), SIZES)
    assert sorted(tensor.data_ptr() for tensor in again) == places
    assert spare.nbytes == 0
    assert len(mappings) == 1
    assert len(driver.locked) == 3


def test_pieces_somewhat_smaller_fit_and_others_do_not(driver: Driver, mappings: list[object]) -> None:
    spare = Spare()
    take(Arena(CPU, spare), SIZES)
    gc.collect()
    assert spare.serves([3 * 2**20, 4 * 2**20], CPU)
    assert not spare.serves([6 * 2**20, 6 * 2**20], CPU)
    assert not spare.serves([2**20], CPU), "a piece of three times the size would be wasted on it"
    larger = take(Arena(CPU, spare), [9 * 2**20])
    assert spare.nbytes == 0, "what does not serve makes way"
    assert len(driver.locked) == 1
    assert larger[0].shape == (9 * 2**20,)


def test_the_device_is_waited_for_once_before_memory_has_another_owner(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare, waits = Spare(), []
    take(Arena(CPU, spare), SIZES)
    gc.collect()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(device))
    again = take(Arena(CPU, spare), SIZES)
    assert len(waits) == 1
    assert len(again) == 3


def test_each_device_has_its_own(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one device has read says nothing of what another reads; it lies near the one and not the other."""
    spare, waits, devices = Spare(), [], [torch.device("cuda", number) for number in range(2)]
    arenas_of = [Arena(device, spare) for device in devices]
    tensors = [pinned_empty((2**20,), torch.uint8, arena=arena) for arena in arenas_of]
    places = [tensor.data_ptr() for tensor in tensors]
    tensors.clear()
    gc.collect()
    assert not spare.serves([2**20, 2**20], devices[0])
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    tensors = [pinned_empty((2**20,), torch.uint8, arena=arena) for arena in reversed(arenas_of)]
    assert [tensor.data_ptr() for tensor in reversed(tensors)] == places
    assert waits == devices[::-1]
    tensors.clear()
    gc.collect()
    arenas_of[0].prepare([9 * 2**20])
    assert spare.serves([2**20], devices[1]), "only what cannot serve this device makes way"


def test_two_threads_never_get_the_same(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the device lets other threads run, in the midst of taking."""
    spare = Spare()
    take(Arena(CPU, spare), [2**20, 2**20])
    gc.collect()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: time.sleep(0.05))
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: pinned_empty((2**20,), torch.uint8, arena=Arena(CPU, spare)), range(2))
    assert one.data_ptr() != other.data_ptr()
    assert spare.nbytes == 0


def test_it_is_given_back_with_the_model(driver: Driver, mappings: list[object]) -> None:
    model = torch.nn.Linear(1, 1)
    take(Arena(CPU, spare_of(model)), SIZES)
    gc.collect()
    assert len(driver.locked) == 3
    assert spare_of(model).nbytes
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert spare_of(twin).nbytes == 0
        assert spare_of(twin) is not spare_of(model)
    del model, twin
    assert left(mappings) == 0
    assert not driver.locked


def test_it_can_be_asked_back(driver: Driver, mappings: list[object]) -> None:
    model = torch.nn.Linear(1, 1)
    assert memory.release(model) == 0  # type: ignore[arg-type]
    take(Arena(CPU, spare_of(model)), SIZES)
    gc.collect()
    assert memory.release(model) == sum(map(arenas.rounded, SIZES))  # type: ignore[arg-type]
    assert left(mappings) == 0
    assert not driver.locked


def test_a_tensor_that_outlives_the_model_is_unregistered_with_its_last_view(driver: Driver) -> None:
    spare = Spare()
    tensors = take(Arena(CPU, spare), SIZES)
    del spare
    gc.collect()
    assert len(driver.locked) == 3
    tensors.clear()
    gc.collect()
    assert not driver.locked


def test_it_makes_way_where_ram_is_short(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    spare = Spare()
    take(Arena(CPU, spare), SIZES)
    gc.collect()
    tried: list[int] = []

    def mapped(nbytes: int) -> object:
        tried.append(spare.nbytes)
        if spare.nbytes:
            raise DoesNotFitError("RAM is short")
        return arenas.mapped(nbytes)

    monkeypatch.setattr("kcache.tiers.pinned.mapped", mapped)
    tensor = pinned_empty((20 * 2**20,), torch.uint8, arena=Arena(CPU, spare))
    assert tried[0] > 0
    assert tried[1] == 0
    assert tensor.shape == (20 * 2**20,)
