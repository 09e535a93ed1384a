"""No gradient goes through a KCache: its rows are kept without their history.

Forwards without ``torch.no_grad()`` are common and harmless; only a backward through one would be wrong, in silence.
So a result that depends on something trained carries a node that raises when a backward comes to it.
"""

from __future__ import annotations

from typing import Any

import torch

from kcache.errors import CacheStateError


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise CacheStateError(
            "no gradient goes through a KCache, which keeps rows without their history; for a backward run the model "
            "without a cache (use_cache=False)"
        )


def without_gradient(result: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """``result``; if any of ``sources``, of which it was made, wants a gradient, a backward through it raises."""
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        barred: torch.Tensor = _Barrier.apply(result, *sources)
        return barred
    return result
