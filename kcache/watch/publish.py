""":func:`kcache.publish`: find the model behind what it is given, and describe it to viewers."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kcache import __version__
from kcache.cache import KCache
from kcache.errors import InputError
from kcache.machine.host import cpu_name, versions
from kcache.models.ends import end_ids
from kcache.models.loaded import LoadedModel
from kcache.models.support import context_length
from kcache.watch.frame import Info
from kcache.watch.publication import Publication
from kcache.watch.tokens import Pieces


def publish(
    target: LoadedModel | PreTrainedModel | KCache,
    *,
    command: str = "python",
    model: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: str | os.PathLike[str] | None = None,
    unix: bool = True,
    port: int | None = None,
    link_gb_s: float | None = None,
) -> Publication:
    """Let viewers watch a model at work, and record it.

    A viewer is ``kcache inspect``, in another terminal, or :meth:`Publication.source
    <kcache.watch.publication.Publication.source>` in this process. Forwards of the model with any
    :class:`~kcache.KCache` are seen from now on. It costs a few microseconds a step while nobody watches.

    Parameters
    ----------
    target : LoadedModel, PreTrainedModel or KCache
        What to watch: all caches of a model, or one cache alone. A loaded model brings its tokenizer and its name.
    command : str
        What viewers call this program.
    model : str, optional
        What viewers call the model.
    tokenizer : PreTrainedTokenizerBase, optional
        Turns token ids into the text viewers show; without one there is none. A reordering of beams is not followed.
    record : path, optional
        Write a recording there; the file must not exist.
    unix : bool
        Publish on this process's socket, which only this user can reach.
    port : int, optional
        Also publish on loopback TCP, 0 for any free port; ``Publication.token`` is what a viewer must know.
    link_gb_s : float, optional
        Measured bandwidth of the link, for viewers to compare with.

    Returns
    -------
    Publication
        A context manager; without ``with``, publishing ends with :meth:`close` or the process.

    Raises
    ------
    WatchError
        If nothing can be published here.
    InputError
        If the recording's file exists or cannot be made.
    """
    only = target if isinstance(target, KCache) else None
    watched = _model_of(target)
    name = model or str(getattr(target, "name", watched.config.name_or_path))
    tokenizer = tokenizer if tokenizer is not None else getattr(target, "tokenizer", None)
    return Publication(
        watched,
        describe(watched, name, command, link_gb_s),
        Pieces(tokenizer),
        end_ids(watched, tokenizer),
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
        weights_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        context_length=context_length(model.config),
        link_gb_s=link_gb_s,
        environment={"kcache": __version__, **found, "os": f"{platform.system()} {platform.machine()}"},
    )


def _model_of(target: Any) -> PreTrainedModel:
    model = target.shared.model() if isinstance(target, KCache) else getattr(target, "model", target)
    if isinstance(target, PreTrainedModel):
        model = target
    if model is None and isinstance(target, KCache):
        raise InputError(
            "publish was given a KCache whose model is no longer there; keep the model as long as its cache"
        )
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"publish takes a loaded model, a transformers model or a KCache, got {type(target).__name__}")
    return model
