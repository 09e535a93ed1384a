"""How many bytes a model and its cache take in either tier, from its config alone, and whether they are there.

What chat, generate and plan ask before anything is loaded. :mod:`kcache.planning.need` counts,
:mod:`kcache.planning.fitting` compares. And the way to get memory back that nobody uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kcache.errors import DoesNotFitError
from kcache.models.weights import Weights
from kcache.planning.fitting import WHOLE, Fitter, Pools, Split
from kcache.planning.need import MemoryNeed, ModelShape, cache_bytes
from kcache.policy import Policy
from kcache.tiers.spare import spare_of

__all__ = ["MemoryNeed", "Split", "batch_sizes", "cache_bytes", "check_fits", "release", "weight_bytes"]

_MOST_ON_CPU = 16
_MOST_ON_GPU = 256


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


def batch_sizes(
    config: PreTrainedConfig,
    ctxs: Sequence[int],
    policy: Policy,
    device: torch.device | str = "cpu",
    *,
    most: int | None = None,
    weights_bytes: int | None = 0,
    dtype_bytes: int = 2,
    split: Split = WHOLE,
) -> list[int]:
    """For each context of ``ctxs`` the largest batch that fits; at least 1.

    Parameters
    ----------
    most : int or None
        Larger batches are not wanted. None for what is sensible: on a GPU up to 256 sequences in what it has free and
        four fifths of the RAM, on a CPU, where a step computes as long as it reads, up to 16 in half of the RAM.
    weights_bytes : int or None
        None where the weights lie on several devices in a way that is not known: half of everything is taken then.
    """
    device = torch.device(device)
    pools = Pools.of(device, split).after((weights_bytes or 0) // split.ranks)
    if weights_bytes is None or (most is None and device.type == "cpu"):
        pools = pools.part(0.5, 0.5)
    elif most is None:
        pools = pools.part(1.0, 0.8)
    most = most or (_MOST_ON_CPU if device.type == "cpu" else _MOST_ON_GPU)
    fitter = Fitter(ModelShape.of(config, dtype_bytes).shared(split.ranks), policy, pools)
    return [max(1, fitter.largest_batch(ctx, most + 1)) for ctx in ctxs]


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype | None = None, **options: Any) -> int:
    """Bytes of the model's weights in ``dtype`` (default: the config's own), counted on the meta device.

    Tied weights count once; ``options`` go to transformers (``trust_remote_code``). A quantised checkpoint takes less;
    its config is not asked how much.
    """
    return Weights.of(config, dtype, **options).total_bytes
