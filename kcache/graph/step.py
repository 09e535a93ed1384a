"""The step that is recorded: from the token ids of a batch to its next logits, on tensors that stay where they are.

The model gets explicit positions and a ready mask of four dimensions, so it asks the cache for no length; the captured
layers bring masks of their own and ignore that one.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from kcache.cache import KCache
from kcache.graph.layers import CapturedCache, CapturedLayer, CapturedTiered, CapturedWindow, Inputs
from kcache.layers.shared import Shared
from kcache.layers.tiered import TieredLayer
from kcache.models.arguments import forward_parameters, with_cache


class GraphStep:
    """One decode step of a model with a cache.

    Parameters
    ----------
    model : PreTrainedModel
        Attached.
    cache : KCache
        Holds at least one row, and room for the next.
    padded : bool
        Whether some rows are not real.

    Attributes
    ----------
    inputs : Inputs
    layers : list of CapturedLayer
    """

    def __init__(self, model: PreTrainedModel, cache: KCache, padded: bool) -> None:
        tiered = cache.tiered_layers
        capacity = min(layer.buffers()[0].shape[2] for layer in tiered)
        self.inputs = Inputs(cache.batch_size, capacity, padded, tiered[0].device)
        self.layers = [self._stand_in(layer, cache.shared) for layer in cache.layers]
        self._model, self._cache = model, CapturedCache(self.layers)
        self._mask = torch.ones(cache.batch_size, 1, 1, 1, dtype=torch.bool, device=tiered[0].device)

    def _stand_in(self, layer: object, shared: Shared) -> CapturedLayer:
        if isinstance(layer, TieredLayer):
            return CapturedTiered(layer, self.inputs)
        assert isinstance(layer, DynamicSlidingWindowLayer)
        return CapturedWindow(layer, self.inputs, shared)

    def run(self) -> torch.Tensor:
        """Take the step; returns logits ``[B, vocabulary]``."""
        self.inputs.locate()
        extra = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(self._model) else {}
        output = self._model(
            input_ids=self.inputs.ids,
            attention_mask=self._mask,
            position_ids=self.inputs.positions,
            **with_cache(self._model, self._cache),
            **extra,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def enter(self, cache: KCache) -> None:
        """Take over what the cache holds: which rows are real, the rows of windows, copies still on their way."""
        validity, valid = cache.shared.validity, self.inputs.valid
        length = int(cache.get_seq_length())
        if valid is not None:
            real = validity.rows(0, length, valid.device)
            valid[:, :length] = True if real is None else real.clone()
            valid[:, length:] = False
        for layer in self.layers:
            if isinstance(layer, CapturedWindow):
                layer.enter(validity)
            else:
                layer.layer.ready_for_kernels()

    def feed(self, tokens: torch.Tensor, going: torch.Tensor | None, end: int) -> None:
        """Set what the next replay reads: a token per sequence ``[B]``, and the length it comes to."""
        self.inputs.ids.copy_(tokens[:, None])
        self.inputs.length.fill_(end)
        if going is None:
            self.inputs.going.fill_(True)
        else:
            self.inputs.going.copy_(going)

    def advance(self, cache: KCache, end: int, event: torch.cuda.Event | None) -> None:
        """Let the cache know of a step that was replayed."""
        self._show()
        for layer in self.layers:
            layer.advance(event)
        cache.shared.validity.grow(end, self.inputs.valid)

    def _show(self) -> None:
        """Copy what all layers picked to where the next replay does not reach, in a launch each for its parts."""
        picking = [layer for layer in self.layers if isinstance(layer, CapturedTiered) and layer.latest]
        for layer in picking:
            layer.shown = layer.shown or [torch.empty_like(tensor) for tensor in layer.latest]
        for part in range(len(picking[0].latest) if picking else 0):
            torch._foreach_copy_([layer.shown[part] for layer in picking], [layer.latest[part] for layer in picking])

    def leave(self) -> None:
        """Give back what stood elsewhere meanwhile."""
        for layer in self.layers:
            if isinstance(layer, CapturedWindow):
                layer.leave()

    def fingerprint(self) -> tuple[object, ...]:
        """What the recording depends on beside the model; another one needs another recording."""
        return tuple(layer.fingerprint() for layer in self.layers)
