"""Which layers keep V on the device, decided from the tensors that arrive and the memory there is.

The unit is the layer, first layers first. The plan is made when the first rows arrive and again whenever the cache
outgrows it; a layer that no longer fits is spilled to the host tier, the last one first. Where a model lies on several
devices each has a budget of its own, for the layers that are there, and the shortest of them sets the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kcache.errors import DoesNotFitError
from kcache.layers.place import Place
from kcache.layers.protocol import Layer
from kcache.machine.devices import decodes_by_kernels
from kcache.machine.parallel import ALONE, Ranks
from kcache.machine.ram import read_ram
from kcache.planning.need import ModelShape
from kcache.planning.sizes import LEAST_RESERVE, TierSizes, in_units, least_resident, reserve, resident_layers
from kcache.policy import Policy
from kcache.tiers.rows import grown_length
from kcache.tiers.spare import Spare


class Residency:
    """The residency plan of one cache.

    Attributes
    ----------
    layers : sequence of Layer
        The layers it plans for, first to last.
    devices : dict
        The device of each layer by its index; a layer that is not named is on the one that first has rows.
    host_bytes : dict
        By device, what each layer whose V may leave it takes of host memory under the plan.
    expected : int
        Rows that are known to come, whatever has come; 0 where that is not known.
    sequences : int
        The same of sequences.
    """

    def __init__(
        self,
        policy: Policy,
        max_length: int | None,
        context: int | None = None,
        ranks: Ranks = ALONE,
        spare: Spare | None = None,
        shape: ModelShape | None = None,
    ) -> None:
        self.policy = policy
        self.max_length = max_length
        self.context = context
        self.layers: Sequence[Layer] = ()
        self.devices: dict[int, torch.device] = {}
        self._ranks = ranks
        self._spare = spare
        self._shape = shape
        self.forget()

    def forget(self) -> None:
        """Back to no plan."""
        self.planned = self.batch = self.expected = self.sequences = 0
        self.keeps_young = True
        self.host_bytes: dict[torch.device, list[int]] = {}
        self._resident: frozenset[int] | None = None

    def room(self) -> int:
        """Rows the plan is for, which is what buffers grow to."""
        return self.planned

    def most_sequences(self) -> int:
        """Sequences that are known to come, which is what the host tier has room for."""
        return self.sequences

    def is_resident(self, layer: Layer) -> bool:
        """Whether the layer's V stays on the device under the current plan."""
        if self.policy.offload == "none":
            return True
        if self._resident is None:
            return layer in self.layers[: self.policy.dense_layers]
        return layer.index in self._resident

    def resident_room(self, layer: Layer) -> int:
        """Rows V on the device grows to: all, or as many as a layer that will leave can hold before it does."""
        young = max(0, self.policy.dense_below - 1)
        return self.planned if self.is_resident(layer) else min(self.planned, young)

    def key_room(self, layer: Layer) -> int:
        """Rows K as it comes grows to: all, unless it is narrowed to 8 bits when V leaves."""
        return self.resident_room(layer) if self.policy.key_planes else self.planned

    def leaves(self, layer: Layer, length: int) -> bool:
        """Whether V of a layer goes to the host tier at ``length`` rows."""
        return not self.is_resident(layer) and self.leaves_at(length)

    def leaves_at(self, length: int) -> bool:
        """Whether V of layers that are not resident is in the host tier at ``length`` rows."""
        return length >= self.policy.dense_below or not self.keeps_young

    def plan(self, layer: Layer, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        """Plan for ``end`` rows, and those expected, if that is more than was planned for, or the batch is larger.

        Where sequences have left, the plan is theirs: what it gave them is still held, and nobody is refused for less.

        Raises
        ------
        DoesNotFitError
            If K (and what must stay beside it) does not fit a device, or offloaded V does not fit host memory.
        """
        end, batch = max(end, self.expected), max(keys.shape[0], self.sequences)
        if end <= self.planned and batch <= self.batch:
            return
        rows = (_row_bytes(keys, batch), _row_bytes(values, batch), values.shape[3], values.element_size())
        sizes = TierSizes.of(self.policy, 0, *rows, hot=decodes_by_kernels(values.device, self.policy))
        needed = end if self.max_length is None else max(end, self.max_length)
        length = aim = self._aim(needed)
        places = self._places(layer, sizes, aim, batch)
        for place in places:
            if not place.fits(aim, place.least):
                if not place.fits(needed, place.least):
                    self._refuse_device(place, needed)
                length = min(length, place.longest(aim))
        for place in places:
            place.resident = resident_layers(place.sizes, self.policy, length, place.room, place.least)
            if self.planned:
                place.resident = min(place.resident, sum(self.is_resident(each) for each in place.layers))
        length = self._fit_host(places, needed, length)
        self.planned, self.batch = length, batch
        self._resident = frozenset(each.index for place in places for each in place.layers[: place.resident])
        young = min(length, max(0, self.policy.dense_below - 1))
        self.keeps_young = all(place.keeps(length, young) for place in places)
        self.host_bytes = {place.device: place.host_bytes(length) for place in places}
        for late in self.layers:
            if late.length and not late.offloaded and self.leaves(late, late.length):
                late.spill()

    def _places(self, layer: Layer, sizes: TierSizes, rows: int, batch: int) -> list[Place]:
        """The devices there are, with their layers, sizes, and budgets for so many rows of each of ``batch`` sequences.

        ``layer`` is the one whose rows arrive.
        """
        expected = self.devices.get(layer.index, layer.device)
        if expected != layer.device:  # the model has been moved since it was looked at
            moved = {index: layer.device for index, device in self.devices.items() if device == expected}
            self.devices.update(moved)
        least = least_resident(self.policy, len(self.layers))
        places: dict[torch.device, Place] = {}
        for position, each in enumerate(self.layers):
            device = each.device if each.is_initialized else self.devices.get(each.index, layer.device)
            if device not in places:
                places[device] = Place(device)
            places[device].layers.append(each)
            places[device].least += position < least
        found = list(places.values())
        for place in found:
            place.sizes = replace(sizes, layers=len(place.layers))
            place.budget = self._budget(place)
            place.working = self._working(place, rows, batch) if self.policy.kv_budget is None else 0
        # Ranks keep V of the same layers: each step they count rows together.
        bounds = self._ranks.least([number for place in found for number in place.bounds])
        for place in found:
            if place.bounds:
                place.budget, room = bounds.pop(0), bounds.pop(0)
                place.working = place.budget - room
        return found

    def _aim(self, needed: int) -> int:
        """Rows to plan for: the known final length, or a quarter more than there was, up to the model's context."""
        if needed in (self.planned, self.max_length):
            return needed
        if needed < self.planned:
            return self.planned
        grown = grown_length(needed, self.planned)
        return grown if self.context is None else max(needed, min(grown, self.context))

    def _budget(self, place: Place) -> int | None:
        """Bytes of a device the cache may take, or None where only RAM bounds it."""
        if self.policy.kv_budget is not None:
            assert isinstance(self.policy.kv_budget, int)
            return self.policy.kv_budget
        if place.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(place.device)
        cached = torch.cuda.memory_reserved(place.device) - torch.cuda.memory_allocated(place.device)
        held = sum(layer.stats().device_bytes for layer in place.layers)
        return max(0, free + cached + held - reserve(free))

    def _working(self, place: Place, rows: int, batch: int) -> int:
        """Bytes of the budget that no V should take which might as well leave: the model works in them.

        Its activations, which most of the reserve may have room for, and unless all of V stays, V on its way through
        and the scratch memory of decode steps. Only an estimate, so nothing is refused for it.
        """
        if self._shape is None or place.budget is None:
            return 0
        kept = reserve(torch.cuda.mem_get_info(place.device)[0]) - LEAST_RESERVE
        alone = max(0, self._shape.working_bytes(rows, batch, self.policy, False) - kept)
        if place.sizes.device(rows, len(place.layers)) <= place.budget - alone:
            return alone
        return max(0, self._shape.working_bytes(rows, batch, self.policy, True) - kept)

    def _fit_host(self, places: list[Place], needed: int, length: int) -> int:
        """As many of ``length`` rows as RAM can hold; where the device is the host, both tiers count.

        Refuses before anything is allocated if that is fewer than ``needed``. Processes that hold the model between
        them share what this machine has, and keep to the shortest.
        """
        held = sum(place.held_in_ram for place in places)
        held += 0 if self._spare is None else self._spare.nbytes
        available = read_ram().available // self._ranks.sharers + held
        (available,) = self._ranks.least([available])

        def wanted(rows: int) -> int:
            return sum(place.in_ram(rows) for place in places)

        if wanted(length) <= available:
            return length
        if wanted(needed) <= available:
            return max(needed, int(length * available / wanted(length)))
        fits = int(needed * available / wanted(needed))
        raise DoesNotFitError(
            f"a cache of {needed:,} tokens needs {in_units(wanted(needed))} of host memory (available: "
            f"{in_units(available)}); {_instead(fits)}"
        )

    def _refuse_device(self, place: Place, length: int) -> None:
        assert place.budget is not None
        hint = "" if self.policy.offload != "none" else ", or offload V with offload='auto'"
        where = "device memory" if len(place.layers) == len(self.layers) else f"memory on {place.device}"
        raise DoesNotFitError(
            f"a cache of {length:,} tokens needs {in_units(place.sizes.device(length, place.least))} of {where} "
            f"(allowed: {in_units(place.budget)}); {_instead(place.longest(length))}{hint}"
        )


def _instead(fits: int) -> str:
    """What would fit where a batch's longest context is ``fits`` tokens."""
    return f"about {fits:,} tokens would fit, or a smaller batch" if fits else "no context would fit in such a batch"


def _row_bytes(rows: torch.Tensor, batch: int) -> int:
    """Bytes of one token's rows in one layer, of ``batch`` sequences and all heads, as those of ``[B, H, T, D]``."""
    _, heads, _, dim = rows.shape
    return batch * heads * dim * rows.element_size()
