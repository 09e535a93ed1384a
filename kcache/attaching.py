"""Letting a model use a KCache: for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from kcache.attention.probe import probe
from kcache.attention.switching import switched
from kcache.errors import expect


@contextmanager
def attach(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let ``model`` use a :class:`~kcache.KCache` for the duration of a ``with`` block.

    The model's attention is switched through transformers' registries and restored on exit. Calls nest and may
    overlap, the last to end restores; several models may be attached at once; with any other cache an attached model
    computes what it always did, prompts in bf16 on some CPUs by another kernel. A model without a layer that can be
    tiered is left alone: all layers of its KCache are stock ones.

    Raises
    ------
    InputError
        If it is no transformers model.
    UnsupportedModelError
        If kcache cannot serve the model; the message says why.
    """
    expect(PreTrainedModel, "model", model, "a transformers model, such as lm.model")
    if not probe(model).tiered:
        yield model
        return
    with switched(model):
        yield model
