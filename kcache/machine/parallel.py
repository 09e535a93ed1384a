"""Tensor parallelism: one model held by several processes, each with a share of its heads.

transformers shards the weights and sums what has to be summed, so q, K and V are local shards and a cache holds its
own heads' rows. What is left to kcache is that all ranks decide alike: the next token, how many rows fit, and the
threshold that counts rows over all heads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from kcache.errors import UnsupportedModelError


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one model between them.

    Attributes
    ----------
    size : int
        How many there are.
    sharers : int
        How many of them are on this machine and share its memory.
    group : process group or None
        What they talk through; None for a process by itself.
    device : torch.device
        Where the group's tensors live; None without a group.
    """

    size: int = 1
    sharers: int = 1
    group: Any = None
    device: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """The same processes: a connection cannot be copied."""
        return self

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest of each number over all ranks."""
        if self.group is None or not numbers:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return [int(number) for number in found.tolist()]

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks; the host does not wait for it."""
        if self.group is None:
            return counts
        counts = counts.to(self.device, copy=True)
        dist.all_reduce(counts, group=self.group)
        return counts

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, on every rank."""
        if self.group is not None:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor


ALONE = Ranks()
"""A process that holds a whole model."""


def ranks_of(model: PreTrainedModel) -> Ranks:
    """Return the processes a model was sharded over when it was loaded."""
    size = getattr(model, "_tp_size", None) or 1
    if size == 1 or not dist.is_initialized():
        return ALONE
    mesh = getattr(model, "_device_mesh", None)
    group = dist.group.WORLD if mesh is None else mesh["tp"].get_group()
    return Ranks(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), group, model.device)


def check_heads(config: PretrainedConfig, name: str, size: int) -> None:
    """Raise unless the heads of a model can be shared out evenly, which its config tells before anything is loaded.

    Raises
    ------
    UnsupportedModelError
        Naming the heads, or saying that transformers has no plan for the model.
    """
    text = config.get_text_config(decoder=True)
    if not text.base_model_tp_plan:
        raise UnsupportedModelError(
            f"transformers has no tensor-parallel plan for {config.model_type} models such as {name}; run it in one "
            "process"
        )
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    for what, found in (("KV heads", kv_heads), ("query heads", heads)):
        layers = found if isinstance(found, (list, tuple)) else [found]
        bad = next((count for count in layers if isinstance(count, int) and count % size), None)
        if bad is not None:
            fits = [str(count) for count in range(1, bad + 1) if bad % count == 0]
            raise UnsupportedModelError(
                f"{name} has {bad} {what}, which {size} processes cannot share evenly; use {' or '.join(fits)}"
            )
