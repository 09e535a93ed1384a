"""Backends compute the four verbs of a decode step: score, select, fetch, combine."""

from __future__ import annotations

import importlib.util

import torch

from kcache.backends.base import Backend, DecodeResult, DecodeStep
from kcache.backends.cpu import CpuBackend
from kcache.backends.reference import ReferenceBackend
from kcache.errors import PolicyError
from kcache.policy import BackendName

__all__ = ["Backend", "DecodeResult", "DecodeStep", "choose_backend", "has_triton"]


def choose_backend(name: BackendName, device: torch.device) -> Backend:
    """Make the backend ``name`` for a device; ``"auto"`` takes the fastest that runs there.

    Raises
    ------
    PolicyError
        If the backend cannot run on the device.
    """
    if name == "auto":
        if device.type == "cpu":
            name = "cpu"
        elif device.type == "cuda" and has_triton():
            name = "triton"
        else:
            name = "reference"
    if name == "reference":
        return ReferenceBackend()
    if name == "cpu":
        if device.type != "cpu":
            raise PolicyError(f"backend 'cpu' cannot serve a layer on {device}; use backend='auto'")
        return CpuBackend()
    from kcache.backends.triton.backend import TritonBackend

    return TritonBackend(device)


def has_triton() -> bool:
    """Whether kernels in Triton can be had; a CUDA device alone does not say."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "kcache.backends.triton"))
