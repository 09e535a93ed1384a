"""How many bytes a model and its cache take in either tier, from its config alone, and whether they are there.

What chat, generate and plan ask before anything is loaded. :mod:`kcache.need` counts, :mod:`kcache.fitting` compares.
And the way to get memory back that nobody uses.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kcache.errors import DoesNotFitError
from kcache.fitting import WHOLE, Fitter, Pools, Split
from kcache.need import MemoryNeed, ModelShape, cache_bytes
from kcache.policy import Policy
from kcache.tiers.spare import spare_of
from kcache.weights import Weights

__all__ = ["MemoryNeed", "Split", "auto_batch_size", "cache_bytes", "check_fits", "release", "weight_bytes"]


def release(model: PreTrainedModel) -> int:
    """Give the host memory back that caches of a model have left for its next one; returns how many bytes.

    On CUDA that is pinned memory, kept as long as the model is. A cache that is still there keeps its own.
    """
    spare = spare_of(model)
    nbytes = spare.nbytes
    spare.release()
    return nbytes


def check_fits(
    config: PreTrainedConfig,
    ctx: int,
    batch: int,
    policy: Policy,
    *,
    device: torch.device | str = "cpu",
    weights_bytes: int = 0,
    dtype_bytes: int = 2,
    split: Split = WHOLE,
) -> MemoryNeed:
    """Raise unless a cache of this size fits, before anything is loaded; ``split`` says what is this process's own.

    Raises
    ------
    DoesNotFitError
        Naming what is short, by how much, and what would fit.
    """
    pools = Pools.of(torch.device(device), split)
    shape = ModelShape.of(config, dtype_bytes).shared(split.ranks)
    fitter = Fitter(shape, policy, pools, weights_bytes // split.ranks)
    fit = fitter.fit(ctx, batch)
    if fit.short is not None:
        raise DoesNotFitError(fitter.refusal(fit, ctx, batch))
    return fit.need


def auto_batch_size(
    config: PreTrainedConfig,
    ctx: int,
    policy: Policy,
    device: torch.device | str = "cpu",
    *,
    weights_bytes: int = 0,
    dtype_bytes: int = 2,
    limit: int = 16,
    split: Split = WHOLE,
) -> int:
    """The largest batch up to ``limit`` (halving from it) whose cache fits in half of what is free; at least 1."""
    pools = Pools.of(torch.device(device), split).after(weights_bytes // split.ranks).half()
    fitter = Fitter(ModelShape.of(config, dtype_bytes).shared(split.ranks), policy, pools)
    batch = limit
    while batch > 1 and not fitter.fits(ctx, batch):
        batch //= 2
    return batch


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype | None = None, **options: Any) -> int:
    """Bytes of the model's weights in ``dtype`` (default: the config's own), counted on the meta device.

    Tied weights count once; ``options`` go to transformers (``trust_remote_code``). A quantised checkpoint takes less;
    its config is not asked how much.
    """
    return Weights.of(config, dtype, **options).total_bytes
