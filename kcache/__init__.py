"""kcache: long-context decoding for any Hugging Face causal LM with K on the device and V in host RAM.

The public names are imported on first use, so ``import kcache`` itself is quick and leaves torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kcache import memory
    from kcache.attaching import attach
    from kcache.cache import KCache
    from kcache.decoding.sampling import Sampling
    from kcache.errors import (
        CacheStateError,
        ContextLengthError,
        DoesNotFitError,
        DownloadError,
        InputError,
        KCacheError,
        ModelNotFoundError,
        PolicyError,
        UnsupportedModelError,
    )
    from kcache.generation import TokenEvent, generate
    from kcache.loading import load, load_config
    from kcache.models.loaded import LoadedModel
    from kcache.models.names import ModelEntry, known_models, pull
    from kcache.policy import Policy, parse_bytes
    from kcache.session import Session, TurnStats
    from kcache.telemetry import LayerSnapshot, Stats, StepSnapshot
    from kcache.watch.publish import publish

__version__ = "0.1.0"

_HOMES = {
    "attaching": ("attach",),
    "cache": ("KCache",),
    "errors": (
        "CacheStateError",
        "ContextLengthError",
        "DoesNotFitError",
        "DownloadError",
        "InputError",
        "KCacheError",
        "ModelNotFoundError",
        "PolicyError",
        "UnsupportedModelError",
    ),
    "generation": ("TokenEvent", "generate"),
    "loading": ("load", "load_config"),
    "memory": ("memory",),
    "models.loaded": ("LoadedModel",),
    "models.names": ("ModelEntry", "known_models", "pull"),
    "policy": ("Policy", "parse_bytes"),
    "decoding.sampling": ("Sampling",),
    "session": ("Session", "TurnStats"),
    "telemetry": ("LayerSnapshot", "Stats", "StepSnapshot"),
    "watch.publish": ("publish",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CacheStateError",
    "ContextLengthError",
    "DoesNotFitError",
    "DownloadError",
    "InputError",
    "KCache",
    "KCacheError",
    "LayerSnapshot",
    "LoadedModel",
    "ModelEntry",
    "ModelNotFoundError",
    "Policy",
    "PolicyError",
    "Sampling",
    "Session",
    "Stats",
    "StepSnapshot",
    "TokenEvent",
    "TurnStats",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "generate",
    "known_models",
    "load",
    "load_config",
    "memory",
    "parse_bytes",
    "publish",
    "pull",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in, once."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{home}")
    value = module if name == home else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, those not yet imported included."""
    return sorted({*globals(), *__all__})
