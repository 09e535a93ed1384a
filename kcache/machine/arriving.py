"""Small tensors on their way from the device to the host, behind the work that made them and ahead of what follows."""

from __future__ import annotations

import numpy as np
import torch


class Arriving:
    """A small tensor on its way to the host.

    Parameters
    ----------
    tensor : Tensor
        Not changed by anybody from now on.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.device.type == "cuda":
            self._host = tensor.detach().to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def numpy(self) -> np.ndarray:
        """The values; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        array: np.ndarray = self._host.numpy()
        return array
