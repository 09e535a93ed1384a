"""The same operations done to a stock cache and to a KCache, logits compared after each forward."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.policy import Policy
from tests.tiny_models import holding

WHOLE = Policy(topn=1_000_000, dense_below=0, dense_layers=0, resident_layers=0)
"""TopN covers any context and every layer is offloaded: the whole path runs and must be exact."""


@torch.no_grad()
def forward(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor | None = None, **extra: Any
) -> torch.Tensor:
    """One forward with ``ids`` ``[B, T]``; ``mask`` covers past and new rows. Returns logits ``[B, T, vocabulary]``."""
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra |= {"attention_mask": mask, "position_ids": positions}
    logits: torch.Tensor = model(input_ids=ids, **holding(cache), use_cache=True, **extra).logits
    return logits


class Pair:
    """A DynamicCache and a KCache that are treated alike.

    Parameters
    ----------
    model : PreTrainedModel
        Not attached; the KCache's forwards attach it.
    policy : Policy
        One that is exact (``topn`` covers the context), unless ``compare`` is off.
    tolerance : float
        Largest difference of two logits, relative to the largest logit.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Policy = WHOLE, *, max_length: int | None = None, tolerance: float = 2e-5
    ) -> None:
        self.model = model
        self.stock = DynamicCache(config=model.config)
        self.ours = KCache(model, policy, max_length=max_length)
        self.mask: torch.Tensor | None = None
        self.tolerance = tolerance

    @property
    def length(self) -> int:
        return self.ours.get_seq_length()

    def extend_mask(self, ids: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor | None:
        """Extend the mask over past and new rows; it stays None while nothing is masked."""
        if new is None and self.mask is None:
            return None
        before = self.mask if self.mask is not None else ids.new_ones(ids.shape[0], self.length)
        self.mask = torch.cat([before, ids.new_ones(ids.shape) if new is None else new.to(ids)], 1)
        return self.mask

    def forward(self, ids: torch.Tensor, new: torch.Tensor | None = None, **extra: Any) -> torch.Tensor:
        """Run ``ids`` through both; ``new`` ``[B, T]`` is 0 where they are padding. Returns our logits."""
        mask = self.extend_mask(ids, new)
        with attach(self.model):
            got = forward(self.model, self.ours, ids, mask, **extra)
        want = self.stock_forward(ids, mask, **extra)
        self.check(got, want, None if mask is None else mask[:, -ids.shape[1] :].bool())
        return got

    def stock_forward(self, ids: torch.Tensor, mask: torch.Tensor | None, **extra: Any) -> torch.Tensor:
        """What our logits must equal."""
        return forward(self.model, self.stock, ids, mask, **extra)

    def check(self, got: torch.Tensor, want: torch.Tensor, valid: torch.Tensor | None) -> None:
        if valid is not None:
            valid = valid[:, -got.shape[1] :]
            got, want = got[valid], want[valid]
        assert got.isfinite().all(), "logits of real tokens are not finite"
        error = (got.float() - want.float()).abs().max() / want.float().abs().max()
        assert error <= self.tolerance, f"logits differ by {error:.2e} of the largest"
        lengths = [layer.get_seq_length() for layer in self.ours.layers]
        assert lengths == [layer.get_seq_length() for layer in self.stock.layers]

    def decode(self, steps: int, seed: int = 99) -> None:
        """Feed random tokens one at a time."""
        batch = self.mask.shape[0] if self.mask is not None else self.batch
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            ids = torch.randint(3, self.model.config.vocab_size, (batch, 1), generator=generator)
            self.forward(ids.to(device))

    @property
    def batch(self) -> int:
        return max(layer.batch_size for layer in self.ours.tiered_layers)

    def crop(self, tokens: int) -> None:
        if self.length:  # stock's layers of some versions cannot be cropped while empty
            self.stock.crop(-tokens)
        self.ours.crop(-tokens)
        if self.mask is not None and tokens:
            self.mask = self.mask[:, :-tokens]

    def reorder(self, index: torch.Tensor) -> None:
        for cache in (self.stock, self.ours):
            cache.reorder_cache(index)
        self._pick(index)

    def select(self, index: torch.Tensor) -> None:
        for cache in (self.stock, self.ours):
            cache.batch_select_indices(index)
        self._pick(index)

    def repeat(self, times: int) -> None:
        for cache in (self.stock, self.ours):
            cache.batch_repeat_interleave(times)
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(times, 0)

    def reset(self) -> None:
        self.stock = DynamicCache(config=self.model.config)  # stock's own reset depends on transformers' version
        self.ours.reset()
        self.mask = None

    def _pick(self, index: torch.Tensor) -> None:
        if self.mask is not None:
            self.mask = self.mask[index.to(self.mask.device)]
