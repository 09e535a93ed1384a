"""Which layers keep V on the device, decided from the tensors that arrive and the memory there is.

The unit is the layer, first layers first. The plan is made when the first rows arrive and again whenever the cache
outgrows it; a layer that no longer fits is spilled to the host tier, the last one first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from kcache.errors import DoesNotFitError
from kcache.policy import Policy
from kcache.sizes import TierSizes, in_units, least_resident, reserve, resident_layers, tail_unit
from kcache.tiers.rows import grown_length

if TYPE_CHECKING:
    from kcache.layer import TieredLayer


class Residency:
    """The residency plan of one cache."""

    def __init__(self, policy: Policy, max_length: int | None, context: int | None = None) -> None:
        self.policy = policy
        self.max_length = max_length
        self.context = context
        self.layers: list[TieredLayer] = []
        self.forget()

    def forget(self) -> None:
        """Back to no plan."""
        self.planned = self.batch = 0
        self.keeps_young = True
        self.resident = len(self.layers) if self.policy.offload == "none" else self.policy.dense_layers

    def room(self) -> int:
        """Rows the plan is for, which is what buffers grow to."""
        return self.planned

    def is_resident(self, layer: TieredLayer) -> bool:
        """Whether the layer's V stays on the device under the current plan."""
        return self.policy.offload == "none" or layer.index in self._resident_indices

    def resident_room(self, layer: TieredLayer) -> int:
        """Rows V on the device grows to: all, or as many as a layer that will leave can hold before it does."""
        young = max(0, self.policy.dense_below - 1)
        return self.planned if self.is_resident(layer) else min(self.planned, young)

    def leaves(self, layer: TieredLayer, length: int) -> bool:
        """Whether V of a layer goes to the host tier at ``length`` rows."""
        return not self.is_resident(layer) and (length >= self.policy.dense_below or not self.keeps_young)

    @property
    def _resident_indices(self) -> frozenset[int]:
        return frozenset(layer.index for layer in self.layers[: self.resident])

    def plan(self, layer: TieredLayer, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        """Plan for ``end`` rows if that is more than was planned for, or the batch is another.

        Raises
        ------
        DoesNotFitError
            If K (and what must stay beside it) does not fit the device, or offloaded V does not fit host memory.
        """
        if end <= self.planned and keys.shape[0] == self.batch:
            return
        v_row = _row_bytes(values)
        tail = tail_unit(self.policy, v_row, values.shape[3], values.shape[0] * values.shape[1])
        sizes = TierSizes(len(self.layers), _row_bytes(keys), v_row, *tail)
        budget = self._budget(layer.device)
        needed = end if self.max_length is None else max(end, self.max_length)
        length = self._aim(needed)
        if budget is not None and sizes.device(length, self._least) > budget:
            if sizes.device(needed, self._least) > budget:
                fits = sizes.longest(self._least, budget, needed)
                self._refuse_device(needed, sizes.device(needed, self._least), budget, fits)
            length = sizes.longest(self._least, budget, length)
        resident = resident_layers(sizes, self.policy, length, budget)
        if self.planned:
            resident = min(resident, self.resident)
        length = self._fit_host(layer.device, sizes, resident, needed, length)
        self.planned, self.batch = length, keys.shape[0]
        self.resident = resident
        young = (len(self.layers) - resident) * sizes.v_row * min(length, max(0, self.policy.dense_below - 1))
        self.keeps_young = budget is None or sizes.device(length, resident) + young <= budget
        for late in self.layers[resident:]:
            if late.length and not late.offloaded and self.leaves(late, late.length):
                late.spill()

    @property
    def _least(self) -> int:
        """Leading layers whose V stays on the device whatever the budget."""
        return least_resident(self.policy, len(self.layers))

    def _aim(self, needed: int) -> int:
        """Rows to plan for: the known final length, or twice what there was, but no more than the model's context."""
        if needed in (self.planned, self.max_length):
            return needed
        if needed < self.planned:
            return self.planned
        grown = grown_length(needed, self.planned)
        return grown if self.context is None else max(needed, min(grown, self.context))

    def _budget(self, device: torch.device) -> int | None:
        """Bytes of the device the cache may take, or None where only RAM bounds it."""
        if self.policy.kv_budget is not None:
            assert isinstance(self.policy.kv_budget, int)
            return self.policy.kv_budget
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        held = sum(layer.stats().device_bytes for layer in self.layers)
        return max(0, free + cached + held - reserve(free))

    def _fit_host(self, device: torch.device, sizes: TierSizes, resident: int, needed: int, length: int) -> int:
        """As many of ``length`` rows as RAM can hold; on a host-only run both tiers count.

        Refuses before anything is allocated if that is fewer than ``needed``.
        """
        both = device.type == "cpu"
        held = [layer.stats() for layer in self.layers]
        held_bytes = sum(stats.host_bytes + (stats.device_bytes if both else 0) for stats in held)
        available = psutil.virtual_memory().available + held_bytes

        def wanted(rows: int) -> int:
            return sizes.host(rows, resident) + (sizes.device(rows, resident) if both else 0)

        if wanted(length) <= available:
            return length
        if wanted(needed) <= available:
            return max(needed, int(length * available / wanted(length)))
        fits = int(needed * available / wanted(needed))
        raise DoesNotFitError(
            f"a cache of {needed:,} tokens needs {in_units(wanted(needed))} of host memory and {in_units(available)} "
            f"are available; about {fits:,} tokens would fit, or a smaller batch"
        )

    def _refuse_device(self, length: int, wanted: int, budget: int, fits: int) -> None:
        hint = "" if self.policy.offload != "none" else ", or offload V with offload='auto'"
        raise DoesNotFitError(
            f"a cache of {length:,} tokens needs {in_units(wanted)} of device memory and {in_units(budget)} are "
            f"allowed; about {fits:,} tokens would fit, or a smaller batch{hint}"
        )


def _row_bytes(rows: torch.Tensor) -> int:
    """Bytes of one token's rows in one layer, all sequences and heads, of ``[B, H, T, D]``."""
    batch, heads, _, dim = rows.shape
    return batch * heads * dim * rows.element_size()
