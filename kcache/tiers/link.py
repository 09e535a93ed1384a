"""The link between the tiers: asynchronous copies on a stream of their own, and the count of every byte that crosses.

On CUDA a copy runs on a side stream, ordered by events and never by a host synchronisation. Where both tiers are RAM
the same code moves (or merely views) the same bytes and counts them alike.
"""

from __future__ import annotations

from typing import Any

import torch


class Link:
    """Copies rows between one device and the host tier.

    Attributes
    ----------
    device : torch.device
        The device end of the link.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        """A link of its own to the same device: streams cannot be copied."""
        return Link(self.device)

    def to_host(self, rows: torch.Tensor, host: torch.Tensor) -> torch.cuda.Event | None:
        """Copy ``rows`` ``[B, H, T, D]`` from the device into the view ``host`` of the same shape.

        Returns the event that ends the copy, or None where the copy is done on return. The device memory of ``rows``
        may be dropped by the caller at once: the allocator keeps it until the copy has read it.
        """
        if self._stream is None:
            host.copy_(rows)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, target in zip(_heads(rows.contiguous()), _heads(host), strict=True):
                target.copy_(source, non_blocking=True)
            rows.record_stream(self._stream)
            return self._stream.record_event()

    def to_device(self, host: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Bring the rows ``host`` ``[B, H, T, D]`` to the device, as the first of a tensor of ``room`` rows.

        Returns the tensor and the event that ends the copy. Copies out that were asked for before are done first.
        """
        rows = torch.empty(*host.shape[:2], room, host.shape[3], dtype=host.dtype, device=self.device)
        if self._stream is None:
            rows[:, :, : host.shape[2]].copy_(host)
            return rows, None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, target in zip(_heads(host), _heads(rows[:, :, : host.shape[2]]), strict=True):
                target.copy_(source, non_blocking=True)
            rows.record_stream(self._stream)
            return rows, self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Make the device's current stream wait for ``event``; the host does not."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _heads(rows: torch.Tensor) -> list[torch.Tensor]:
    """The contiguous pieces ``[T, D]`` of ``[B, H, T, D]``: one copy each, since a strided copy would be staged."""
    return [head for sequence in rows.unbind(0) for head in sequence.unbind(0)]
