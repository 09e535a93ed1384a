"""Where a model that lies on several devices takes its tokens, the device maps it is spread by, what runs kernels.

accelerate runs each module on a device of its own and streams in weights that are kept in RAM or on disk, so a
parameter's device says where it is kept, and the hook on the model says where it runs.
"""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kcache.errors import InputError
from kcache.policy import Policy

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's names for ways to spread a model over what devices there are."""
PLACES = "cpu, disk, a GPU's number, or a device such as cuda:1"
_LEAST = (8, 0)
"""Compute capability from which Triton supports a card: Ampere."""


def has_triton() -> bool:
    """Whether kernels in Triton can be had; a CUDA device alone does not say."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "kcache.backends.triton"))


def is_too_old(device: torch.device) -> bool:
    """Whether Triton does not support this CUDA device."""
    return torch.cuda.get_device_capability(device) < _LEAST


def is_rocm() -> bool:
    """Whether torch's CUDA devices are AMD's: our programs wait for each other in the order NVIDIA starts them."""
    return getattr(torch.version, "hip", None) is not None


@lru_cache
def driver_problem() -> str | None:
    """Why Triton does not get to the driver, or None: it compiles a module in C for that when it is first used."""
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_device()
    except Exception as error:  # whatever a build can end in
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def why_no_kernels(device: torch.device) -> str | None:
    """Why our kernels in Triton do not run on a CUDA device, or None."""
    if not has_triton():
        return "triton is not installed"
    if is_rocm():
        return "torch is built for ROCm, and kernels are made for NVIDIA's cards"
    if is_too_old(device):
        have, need = (f"{major}.{minor}" for major, minor in (torch.cuda.get_device_capability(device), _LEAST))
        return f"{device} has compute capability {have}, kernels need {need}"
    problem = driver_problem()
    return None if problem is None else f"triton cannot be used here ({problem})"


def runs_kernels(device: torch.device) -> bool:
    """Whether our kernels in Triton run on a device."""
    return device.type == "cuda" and why_no_kernels(device) is None


def decodes_by_kernels(device: torch.device, policy: Policy) -> bool:
    """Whether our kernels decode the layers on a device, which can keep hot rows there and K in two planes."""
    return policy.backend != "reference" and runs_kernels(device)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device token ids go to: where the first layers run, even if their weights are kept elsewhere."""
    found = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if found is not None:
        return torch.device(found)
    return torch.device("cpu") if model.device.type == "meta" else model.device


def read_device_map(path: Path) -> dict[str, str | int]:
    """Read an explicit device map, ``{"module": "device"}`` in JSON, as accelerate has it.

    Raises
    ------
    InputError
        If the file cannot be read or is no such map.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the device map {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"the device map {path} is not JSON: {error}") from None
    check_device_map(value, str(path))
    return value


def check_device_map(value: Any, name: str) -> None:
    """Raise :class:`InputError` unless ``value`` maps module names to places that are here."""
    if not isinstance(value, dict) or not value:
        raise InputError(f'{name} is no device map; write {{"module": device}}, a device being {PLACES}')
    for module, place in value.items():
        if place in ("cpu", "disk") and not isinstance(place, bool):
            continue
        device = _device_of(place)
        if device is None:
            raise InputError(f"{name} puts {module!r} on {place!r}, which is no device; use {PLACES}")
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise InputError(f"{name} puts {module!r} on {device}, and torch sees {count} CUDA devices here")


def _device_of(place: Any) -> torch.device | None:
    """The device meant by a place in a map, here or not; None if it is none."""
    if isinstance(place, bool):
        return None
    try:
        return torch.device(place)
    except (RuntimeError, TypeError, ValueError):  # torch knows no device by its number where there is none
        return torch.device("cuda", place) if isinstance(place, int) and 0 <= place < 128 else None
