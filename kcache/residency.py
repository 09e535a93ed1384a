"""Which layers keep V on the device, decided from the tensors that arrive and the memory there is.

The unit is the layer, first layers first. The plan is made when the first rows arrive and again whenever the cache
outgrows it; a layer that no longer fits is spilled to the host tier, the last one first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from kcache.errors import DoesNotFitError
from kcache.policy import Policy
from kcache.tiers.rows import grown_length

if TYPE_CHECKING:
    from kcache.layer import TieredLayer

_ACTIVATIONS = 512 * 2**20


class Residency:
    """The residency plan of one cache."""

    def __init__(self, policy: Policy, max_length: int | None) -> None:
        self.policy = policy
        self.max_length = max_length
        self.layers: list[TieredLayer] = []
        self.forget()

    def forget(self) -> None:
        """Back to no plan."""
        self.planned = self.batch = 0
        self.resident = len(self.layers) if self.policy.offload == "none" else self.policy.dense_layers

    def room(self) -> int:
        """Rows the plan is for, which is what buffers grow to."""
        return self.planned

    def is_resident(self, layer: TieredLayer) -> bool:
        """Whether the layer's V stays on the device under the current plan."""
        return self.policy.offload == "none" or layer.index in self._resident_indices

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
        sizes = _Sizes(len(self.layers), _row_bytes(keys), _row_bytes(values), self._block)
        budget = self._budget(layer.device)
        needed = end if self.max_length is None else max(end, self.max_length)
        length = self._aim(needed)
        if budget is not None and sizes.device(length, self._least) > budget:
            if sizes.device(needed, self._least) > budget:
                fits = sizes.longest(self._least, budget, needed)
                self._refuse_device(needed, sizes.device(needed, self._least), budget, fits)
            length = sizes.longest(self._least, budget, length)
        resident = self._count(sizes, length, budget)
        if self.planned:
            resident = min(resident, self.resident)
        length = self._fit_host(layer.device, sizes, resident, needed, length)
        self.planned, self.batch = length, keys.shape[0]
        before, self.resident = self.resident, resident
        for late in self.layers[resident:before]:
            if late.length >= max(1, self.policy.dense_below) and not late.offloaded:
                late.spill()

    @property
    def _least(self) -> int:
        """Leading layers whose V stays on the device whatever the budget."""
        count = len(self.layers)
        if self.policy.offload == "none":
            return count
        return min(count, max(self.policy.dense_layers, self.policy.resident_layers or 0))

    @property
    def _block(self) -> int | None:
        return self.policy.tail_block if self.policy.tail == "block" else None

    def _aim(self, needed: int) -> int:
        """Rows to plan for: the known final length, or twice what there was."""
        if needed in (self.planned, self.max_length):
            return needed
        return self.planned if needed < self.planned else grown_length(needed, self.planned)

    def _count(self, sizes: _Sizes, length: int, budget: int | None) -> int:
        """Leading layers whose V stays on the device."""
        flexible = self.policy.offload == "auto" and self.policy.resident_layers is None
        resident = self._least
        while flexible and budget is not None and resident < sizes.layers:
            if sizes.device(length, resident + 1) > budget:
                break
            resident += 1
        return resident

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
        return max(0, free + cached + held - max(_ACTIVATIONS, free // 20))

    def _fit_host(self, device: torch.device, sizes: _Sizes, resident: int, needed: int, length: int) -> int:
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
            f"a cache of {needed:,} tokens needs {_size(wanted(needed))} of host memory and {_size(available)} are "
            f"available; about {fits:,} tokens would fit, or a smaller batch"
        )

    def _refuse_device(self, length: int, wanted: int, budget: int, fits: int) -> None:
        hint = "" if self.policy.offload != "none" else ", or offload V with offload='auto'"
        raise DoesNotFitError(
            f"a cache of {length:,} tokens needs {_size(wanted)} of device memory and {_size(budget)} are allowed; "
            f"about {fits:,} tokens would fit, or a smaller batch{hint}"
        )


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the tiered layers: of one token's K and V rows in one layer, all sequences, and rows per tail block."""

    layers: int
    k_row: int
    v_row: int
    block: int | None

    def device(self, length: int, resident: int) -> int:
        """Bytes on the device at ``length`` rows with V of ``resident`` layers there."""
        tail = 0 if self.block is None else -(-length // self.block)
        return self.layers * self.k_row * length + self.v_row * (resident * length + (self.layers - resident) * tail)

    def host(self, length: int, resident: int) -> int:
        """Bytes in the host tier."""
        return (self.layers - resident) * self.v_row * length

    def longest(self, resident: int, budget: int, below: int) -> int:
        """The most rows, at most ``below``, whose device bytes stay within ``budget``."""
        low, high = 0, below
        while low < high:
            middle = (low + high + 1) // 2
            if self.device(middle, resident) <= budget:
                low = middle
            else:
                high = middle - 1
        return low


def _row_bytes(rows: torch.Tensor) -> int:
    """Bytes of one token's rows in one layer, all sequences and heads, of ``[B, H, T, D]``."""
    batch, heads, _, dim = rows.shape
    return batch * heads * dim * rows.element_size()


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
