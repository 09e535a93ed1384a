"""A layer that has full attention and a recurrent state side by side: K and V tiered, the state as in stock's cache."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from kcache.layers.shared import Shared
from kcache.layers.tiered import TieredLayer


class HybridTieredLayer(TieredLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A :class:`~kcache.layers.tiered.TieredLayer` with ``number_of_states`` convolution and recurrent states."""

    is_croppable = LinearAttentionCacheLayerMixin.is_croppable  # type: ignore[assignment]

    def __init__(self, index: int, shared: Shared, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        TieredLayer.__init__(self, index, shared)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Learn the shapes of K and V (two positional arguments) or of a state (keywords), as in stock's layer."""
        part: Any = TieredLayer if args else LinearAttentionLayer
        part.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Empty both parts."""
        LinearAttentionLayer.reset(self)
        TieredLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, if the state's past was recorded."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        TieredLayer.crop(self, tokens_to_remove)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` ``[B']``, in that order."""
        LinearAttentionLayer.reorder_cache(self, cast(torch.LongTensor, indices))
        TieredLayer.batch_select_indices(self, indices)
