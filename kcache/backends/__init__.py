"""Backends compute the four verbs of a decode step: score, select, fetch, combine."""

from __future__ import annotations

import torch

from kcache.backends.base import Backend, DecodeResult, DecodeStep
from kcache.backends.cpu import CpuBackend
from kcache.backends.reference import ReferenceBackend
from kcache.errors import PolicyError
from kcache.machine.devices import has_triton, runs_kernels, why_no_kernels
from kcache.policy import BackendName

__all__ = ["Backend", "DecodeResult", "DecodeStep", "choose_backend"]


def choose_backend(name: BackendName, device: torch.device) -> Backend:
    """Make the backend ``name`` for a device; ``"auto"`` takes the fastest that runs there.

    Raises
    ------
    PolicyError
        If the backend cannot run on the device.
    """
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "triton" if runs_kernels(device) else "reference"
    if name == "reference":
        return ReferenceBackend()
    if name == "cpu":
        if device.type != "cpu":
            raise PolicyError(f"backend 'cpu' cannot serve a layer on {device}; use backend='auto'")
        return CpuBackend()
    reason = why_no_kernels(device) if device.type == "cuda" or not has_triton() else None
    if reason is not None:
        raise PolicyError(f"backend 'triton' cannot serve layers here: {reason}; use backend='auto'")
    from kcache.backends.triton.backend import TritonBackend

    return TritonBackend(device)
