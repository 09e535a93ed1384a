"""A machine of round numbers, so that floors can be worked out by hand."""

from __future__ import annotations

from typing import Any

from kcache.models.loaded import LoadedModel
from kcache.speed.machine import Machine
from tests.saved import byte_tokenizer, byte_vocabulary
from tests.tiny_models import make


def machine(**changes: Any) -> Machine:
    """100 GB/s of memory, 10 GB/s of single rows, no device."""
    values: dict[str, Any] = {
        "device": "cpu",
        "name": "Test CPU",
        "device_copy_gb_s": 100.0,
        "device_read_gb_s": 80.0,
        "ram_copy_gb_s": 100.0,
        "ram_read_gb_s": 80.0,
        "h2d_gb_s": None,
        "d2h_gb_s": None,
        "gather_gb_s": 10.0,
        "compute_tflops": 1.0,
        "device_bytes": 2**34,
        "host_bytes": 2**34,
        "host_free_bytes": 2**33,
        "threads": 1,
        "versions": {"torch": "0.0", "driver": None},
    }
    return Machine(**{**values, **changes})


def tiny(kind: str = "llama", **changes: Any) -> LoadedModel:
    """A tiny random model with a byte tokenizer."""
    return LoadedModel("tiny", make(kind, **{"vocab_size": len(byte_vocabulary()), **changes}), byte_tokenizer())
