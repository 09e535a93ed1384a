"""What a model's forward takes, and what it calls its cache: transformers renamed that, and code of others did not."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

CACHE_NAMES = ("past_key_values", "cache")
"""The second is that of transformers since 5.24."""


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of what a model's forward takes."""
    return _parameters(cast(Any, type(model)))


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """Return the arguments of a forward that reads and fills ``cache``."""
    accepted = forward_parameters(model)
    return {next((name for name in CACHE_NAMES if name in accepted), usual_name()): cache, "use_cache": True}


def cache_in(arguments: dict[str, Any]) -> object:
    """Return the cache among the arguments of a forward, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


@lru_cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@lru_cache
def usual_name() -> str:
    """What transformers' own models call it, for a forward that names nothing."""
    from transformers import GenerationMixin

    taken = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in taken)
