"""Switching a model to kcache's attention, through transformers' registries, and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from kcache.attention.function import attention, mask_function
from kcache.errors import UnsupportedModelError

_NAME = "kcache"
_EAGER = "kcache_eager"
_SCOPES = "_kcache_scopes"
_LOCK = threading.Lock()


@dataclass
class _Scopes:
    """The open :func:`switched` blocks of a model, and what to restore when the last of them ends."""

    before: list[tuple[PreTrainedConfig, str | None]]
    count: int = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be that of a model that was copied or saved whole: none of its blocks is open, so it is not attached."""
        _restore(state["before"])
        self.before, self.count = [], 0


@contextmanager
def switched(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` with kcache's attention, whatever it is."""
    with _LOCK:
        scopes = vars(model).get(_SCOPES)
        if scopes is None or not scopes.count:
            scopes = vars(model)[_SCOPES] = _Scopes(_switch_on(model))
        scopes.count += 1
    try:
        yield
    finally:
        with _LOCK:
            scopes.count -= 1
            if scopes.count == 0:
                del vars(model)[_SCOPES]
                _restore(scopes.before)


def _switch_on(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """Make the model run kcache's attention; returns what its configs said before."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    if is_attached(model):
        return before
    _register()
    name = _EAGER if text_config(model)._attn_implementation == "eager" else _NAME
    try:
        model.set_attn_implementation(name)
        _switch_copies(model, name)
    except (ValueError, NotImplementedError) as error:  # transformers' own ways of saying that it cannot
        _restore(before)
        raise UnsupportedModelError(f"{type(model).__name__} cannot be attached: {error}") from error
    if not is_attached(model):
        _restore(before)
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention from transformers' registry, so kcache cannot "
            "serve it; use it with its own cache"
        )
    return before


def _switch_copies(model: PreTrainedModel, name: str) -> None:
    """Switch the modules that have a config of their own, as layers do that are copies of others.

    transformers switches models alone, whose configs other modules mostly share.
    """
    kind = type(text_config(model))
    if is_attached(model):
        for config in _configs(model):
            if type(config) is kind:
                config._attn_implementation_internal = name


def _restore(before: list[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, implementation in before:
        config._attn_implementation_internal = implementation


def is_attached(model: PreTrainedModel) -> bool:
    """Whether the model's decoder now runs kcache's attention function."""
    return is_ours(text_config(model))


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether a decoder's config names kcache's attention function."""
    return config._attn_implementation in (_NAME, _EAGER)


def _register() -> None:
    for name, fallback in ((_NAME, "sdpa"), (_EAGER, "eager")):
        AttentionInterface.register(name, partial(attention, fallback=fallback))
        AttentionMaskInterface.register(name, mask_function)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the model's decoder."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every distinct config of the model and its sub-models."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found.setdefault(id(config), config)
    text = text_config(model)
    found.setdefault(id(text), text)
    return list(found.values())
