"""V of one layer: on the device while it is young or resident, in the host tier once it is not.

Rows leave by an asynchronous copy as they arrive and their device memory is released. An exact pass brings all of
them back into a tensor that lives for one layer's attention, the next layer's already under way. What stays on the
device of an offloaded layer is the tail: where its rows lie along a few directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from kcache.backends.base import HotStore
from kcache.policy import Policy
from kcache.tiers.bytes import ByteRows
from kcache.tiers.link import Link
from kcache.tiers.lowrank import LowRankTail
from kcache.tiers.rows import RowBuffer
from kcache.tiers.validity import Validity


class ValueStore:
    """V rows ``[B, Hkv, T, Dv]`` of one layer in whichever tier holds them.

    ``hot`` is the store of hot rows, put there by whoever fetches and knows how; it is emptied or dropped here when
    positions or sequences change.

    Parameters
    ----------
    device : torch.device
        The layer's device.
    policy : Policy
    validity : Validity
        Which rows are real, shared by all layers of the cache.
    room : callable
        Tells how many rows to make room for when a buffer has to grow.
    resident_room : callable
        The same for V on the device, which a young layer soon leaves; default ``room``.
    link : Link, optional
        The one that all layers on the device use; default one of its own.
    sequences : callable, optional
        Tells how many sequences the host tier is to have room for, if fewer come: what is prepared is for those.
    """

    def __init__(
        self,
        device: torch.device,
        policy: Policy,
        validity: Validity,
        room: Callable[[], int] | None = None,
        resident_room: Callable[[], int] | None = None,
        link: Link | None = None,
        sequences: Callable[[], int] | None = None,
    ) -> None:
        self.device = device
        self.length = 0
        self.bytes_h2d = self.bytes_d2h = 0
        self.resident: RowBuffer | None = RowBuffer(device, resident_room or room)
        self.host: RowBuffer | ByteRows | None = None
        self.tail: LowRankTail | None = None
        self.hot: HotStore | None = None
        self.link = link or Link(device)
        self._policy = policy
        self._validity = validity
        self._room = room
        self._sequences = sequences
        self._settled_hits = 0
        self._untailed: torch.Tensor | None = None
        self._sent: torch.cuda.Event | None = None
        self._ahead: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    # -- filling ---------------------------------------------------------------------------------------------------

    def append(self, rows: torch.Tensor, start: int, offload: bool) -> None:
        """Store new rows after the first ``start``; with ``offload`` they, and any on the device, go to the host tier.

        Rows from ``start`` on that an interrupted forward may have left are forgotten.
        """
        if self.length > start:
            self.crop(start)
        end = start + rows.shape[2]
        if offload and self.host is None:
            self.spill()
        if self.host is None:
            assert self.resident is not None
            self.resident.put(rows, self.length)
        else:
            self._send(rows, self.length)
        self.length = end

    def spill(self) -> None:
        """Move what the device holds to the host tier; the device memory is given back."""
        young = self.resident
        host = self._host_rows()
        if young is not None and young.data is not None and self.length:
            host.reserve(young.data, self.length)  # may be refused; nothing has been lost then
        self.host, self.resident = host, None
        if self._policy.tail == "lowrank":
            self.tail = LowRankTail(self._policy.tail_rank, self.device, self._room)
        if young is not None and young.data is not None and self.length:
            self._send(young.view(self.length), 0)
            if self._validity.length >= self.length:
                self.settle()
            self.release()

    def _host_rows(self) -> RowBuffer | ByteRows:
        cpu = torch.device("cpu")
        reader, arena = (self.device, self.link.arena) if self.device.type == "cuda" else (None, None)
        if self._policy.v_bits == 8:
            return ByteRows(cpu, self.device, self._room, reader, arena, self._sequences)
        return RowBuffer(cpu, self._room, reader, arena=arena, sequences=self._sequences)

    def _send(self, rows: torch.Tensor, start: int) -> None:
        """Start the copy of rows to the host tier, as rows ``start`` and following."""
        assert self.host is not None
        if start + rows.shape[2] > self.host.capacity:
            self.finish_sending()

        def send(part: torch.Tensor, place: torch.Tensor) -> None:
            self._sent = self.link.to_host(part, place)
            self.bytes_d2h += part.nbytes

        self.host.take(rows, start, send)
        if self.tail is not None:
            self._untailed = rows

    def stored_by_kernel(self, event: torch.cuda.Event | None) -> None:
        """Note a row that a kernel has written, here and in the tail; ``event`` ends the kernel."""
        self.length += 1
        if self.host is None:
            return
        assert self.host.data is not None
        self._sent, self._untailed = event, None
        self.bytes_d2h += self.host.data.shape[0] * self.host.heads * self.host.row_bytes
        if self.tail is not None:
            self.tail.length += 1

    def settle(self) -> None:
        """Take the rows that are new into the tail, now that it is known which of them are valid.

        Those are the rows of the latest append, still on the device; if several appends came without attention in
        between, they are brought back.
        """
        if self.tail is None or self.tail.length == self.length:
            return
        start, end = self.tail.begins_at(self.length), self.length
        rows, self._untailed = self._untailed, None
        if rows is None or rows.shape[2] != end - start:
            rows = self._bring_back(start, end)
        self.tail.append(rows, self._validity.rows(start, end, self.device), start)

    def release(self) -> None:
        """Let go of the latest rows' device memory, though the tail has not seen them."""
        self._untailed = None
        self.link.let_go()

    def _bring_back(self, start: int, end: int) -> torch.Tensor:
        """Rows ``start:end`` from the host tier, on the device."""
        assert self.host is not None
        rows = self.host.view(end)[:, :, start:]
        self.bytes_h2d += rows.nbytes
        if self.device.type != "cpu":
            rows, arrived = self.link.to_device(rows, end - start)
            self.link.wait(arrived)
        return self.host.widen(rows, start)

    # -- reading ---------------------------------------------------------------------------------------------------

    def view(self) -> torch.Tensor:
        """All rows where they are, for the host to read if that is the host tier."""
        if self.host is None:
            assert self.resident is not None
            return self.resident.view(self.length)
        self.finish_sending()
        return self.host.get(self.length)

    def everything(self) -> torch.Tensor:
        """All rows on the device."""
        rows, arrived = self.fetch(self.length, self.length)
        self.link.wait(arrived)
        return rows if self.host is None else self.host.widen(rows, 0)

    def fetch(self, length: int, room: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The first ``length`` rows on the device, as they are kept, in a tensor of ``room`` rows; the copy's end."""
        if self.host is None:
            assert self.resident is not None
            return self.resident.view(room), None
        rows = self.host.view(length)
        self.bytes_h2d += rows.nbytes
        if self.device.type == "cpu":
            return self.host.view(room), None
        # One size for all chunks of a prompt: what an earlier one has freed fits the next.
        whole, arrived = self.link.to_device(rows, max(room, self._room() if self._room is not None else 0))
        return whole[:, :, :room], arrived

    def prefetch(self, chunk: int) -> None:
        """Start bringing all rows to the device for the exact pass over ``chunk`` more that is about to come."""
        if self.host is not None and self.length and self.device.type != "cpu":
            self._ahead = self.fetch(self.length, self.length + chunk)

    def whole(self, chunk: torch.Tensor) -> torch.Tensor:
        """All rows on the device for an exact pass, the latest of which are ``chunk``."""
        if self.host is None:
            assert self.resident is not None
            return self.resident.view(self.length)
        past = self.length - chunk.shape[2]
        if past == 0:
            return chunk
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0].shape[2] != self.length:
            ahead = self.fetch(past, self.length)
        rows, arrived = ahead
        self.link.wait(arrived)
        if isinstance(self.host, ByteRows):
            return self.host.followed_by(chunk, self.length, rows)
        if self.device.type != "cpu":
            rows[:, :, past:].copy_(chunk)
        return rows

    def ready_for_kernels(self) -> None:
        """Order the device's reads of host rows after the copies that wrote them; the host does not wait."""
        self.link.wait(self._sent)

    def finish_sending(self) -> None:
        """Wait on the host for the last copy out: only before the host itself reads or moves the rows."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None

    # -- changing --------------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Keep the first ``length`` rows."""
        self.release()
        self._ahead = None
        if self.resident is not None:
            self.resident.wipe(length, self.length)
        self.length = length
        if self.tail is not None:
            self.tail.crop(length)
        if self.hot is not None:
            self.hot.forget()

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences ``index`` ``[B']``, in that order; host rows are copied on the host."""
        self.finish_sending()
        self.release()
        self._ahead = None
        if self.host is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step under way reads host rows where they now are
        for buffer in (self.resident, self.host, self.tail):
            if buffer is not None:
                buffer.select(index)
        self._settled_hits, self.hot = self.hot_hits, None

    def __deepcopy__(self, memo: dict[int, Any]) -> ValueStore:
        """Copy what has arrived; nothing is under way in the copy."""
        self.finish_sending()
        self.release()
        self._ahead = None
        memo[id(self)] = twin = object.__new__(ValueStore)
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    # -- counting --------------------------------------------------------------------------------------------------

    @property
    def resident_bytes(self) -> int:
        """Bytes of V on the device."""
        return 0 if self.resident is None else self.resident.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes of V in the host tier."""
        return 0 if self.host is None else self.host.nbytes

    @property
    def overhead_bytes(self) -> int:
        """Bytes on the device of the tail, of hot rows, and of the scales of rows in 8 bits."""
        scales = self.host.scale_bytes if isinstance(self.host, ByteRows) else 0
        return self.hot_bytes + scales + (0 if self.tail is None else self.tail.nbytes)

    @property
    def hot_bytes(self) -> int:
        """Those of them that hot rows take."""
        return 0 if self.hot is None else self.hot.nbytes

    @property
    def hot_hits(self) -> int:
        """Picks that were found on the device; waits for it, which counts them."""
        return self._settled_hits + (0 if self.hot is None else int(self.hot.hits.sum()))
