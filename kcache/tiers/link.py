"""The link between the tiers: asynchronous copies on streams of their own, one for each way.

On CUDA a copy is ordered by events and never by a host synchronisation, and so is the memory it uses: what leaves is
kept until the stream that made it has been told to wait for the copy, and what arrives is memory of the copying stream,
which waits for the readers of what was there before. torch's ``record_stream`` would do the same by asking the driver,
at every allocation, whether each copy under way has ended. Where both tiers are RAM the same code moves the same bytes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from kcache.tiers.arena import Arena
from kcache.tiers.spare import Spare


class Link:
    """Copies rows between one device and the host tier; the layers of a cache on one device share it.

    Attributes
    ----------
    device : torch.device
        The device end of the link.
    arena : Arena
        Host memory prepared for the other end.
    """

    def __init__(self, device: torch.device, spare: Spare | None = None) -> None:
        self.device = device
        self.arena = Arena(device, spare)
        self._leaving: tuple[torch.Tensor, torch.cuda.Event, torch.cuda.Stream] | None = None
        self._out, self._back = self._streams()

    def _streams(self) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
        if self.device.type != "cuda":
            return None, None
        return torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        """A link of its own to the same device: streams cannot be copied."""
        twin = type(self)(self.device)
        twin.arena = copy.deepcopy(self.arena, memo)
        return twin

    def to_host(self, rows: torch.Tensor, host: torch.Tensor) -> torch.cuda.Event | None:
        """Copy ``rows`` ``[B, H, T, D]`` from the device into the view ``host`` of the same shape.

        Returns the event that ends the copy, or None where the copy is done on return. The caller may drop ``rows`` at
        once; their memory is free after the next copy out, or :meth:`let_go`.
        """
        if self._out is None:
            host.copy_(rows)
            return None
        self.let_go()
        maker = torch.cuda.current_stream(self.device)
        self._out.wait_stream(maker)
        with torch.cuda.stream(self._out):
            try:
                for source, target in zip(_heads(rows.contiguous()), _heads(host), strict=True):
                    target.copy_(source, non_blocking=True)
            finally:
                event = self._out.record_event()
                self._leaving = rows, event, maker
        return event

    def let_go(self) -> None:
        """Give back the device memory of the latest rows copied out, as soon as that copy has ended.

        The stream that made them waits for the copy, not the host: whatever it writes there next comes after.
        """
        if self._leaving is not None:
            (_, event, maker), self._leaving = self._leaving, None
            maker.wait_event(event)

    def to_device(self, host: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Bring the rows ``host`` ``[B, H, T, D]`` to the device, as the first of a tensor of ``room`` rows.

        Returns the tensor and the event that ends the copy. Copies out that were asked for before are done first. The
        tensor may be dropped at any time: its memory is used again by such copies alone, which come after this one and
        wait for whatever the current stream was given to read it with.
        """
        shape = (*host.shape[:2], room, host.shape[3])
        if self._out is None or self._back is None:
            rows = torch.empty(shape, dtype=host.dtype, device=self.device)
            rows[:, :, : host.shape[2]].copy_(host)
            return rows, None
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        self._back.wait_stream(self._out)
        with torch.cuda.stream(self._back):
            rows = torch.empty(shape, dtype=host.dtype, device=self.device)
            for source, target in zip(_heads(host), _heads(rows[:, :, : host.shape[2]]), strict=True):
                target.copy_(source, non_blocking=True)
            return rows, self._back.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Make the device's current stream wait for ``event``; the host does not."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _heads(rows: torch.Tensor) -> list[torch.Tensor]:
    """The contiguous pieces ``[T, D]`` of ``[B, H, T, D]``: one copy each, since a strided copy would be staged."""
    return [head for sequence in rows.unbind(0) for head in sequence.unbind(0)]
