"""What :func:`kcache.telemetry.publish` does: find the model behind what it is given, and describe it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kcache
from kcache.cache import KCache
from kcache.errors import InputError
from kcache.host import cpu_name, versions
from kcache.support import context_length
from kcache.watch.frame import Info
from kcache.watch.publish import Publication
from kcache.watch.tokens import Pieces

if TYPE_CHECKING:
    from kcache.loading import LoadedModel


def begin(
    target: LoadedModel | PreTrainedModel | KCache,
    command: str,
    name: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    record: str | os.PathLike[str] | None,
    unix: bool,
    port: int | None,
    link_gb_s: float | None,
) -> Publication:
    """See :func:`kcache.telemetry.publish`."""
    only = target if isinstance(target, KCache) else None
    model = _model_of(target)
    tokenizer = tokenizer if tokenizer is not None else getattr(target, "tokenizer", None)
    return Publication(
        model,
        describe(model, name or str(getattr(target, "name", model.config.name_or_path)), command, link_gb_s),
        Pieces(tokenizer),
        _ends(model, tokenizer),
        only,
        None if record is None else Path(record),
        unix,
        port,
    )


def describe(model: PreTrainedModel, name: str, command: str, link_gb_s: float | None = None) -> Info:
    """Say who publishes."""
    device: Any = model.device
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    found = {key: value for key, value in versions().items() if value is not None}
    return Info(
        pid=os.getpid(),
        command=command,
        model=name or type(model).__name__,
        started_s=time.time(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        host_only=device.type != "cuda",
        weights_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        context_length=context_length(model.config),
        link_gb_s=link_gb_s,
        environment={"kcache": kcache.__version__, **found, "os": f"{platform.system()} {platform.machine()}"},
    )


def _model_of(target: Any) -> PreTrainedModel:
    model = target.shared.model() if isinstance(target, KCache) else getattr(target, "model", target)
    if isinstance(target, PreTrainedModel):
        model = target
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"publish takes a loaded model, a transformers model or a KCache, got {type(target).__name__}")
    return model


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Token ids that end a sequence."""
    found = model.generation_config.eos_token_id
    ids = {*(found if isinstance(found, (list, tuple)) else [found]), getattr(tokenizer, "eos_token_id", None)}
    return frozenset(int(token) for token in ids if token is not None)
