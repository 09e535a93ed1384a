"""What a policy may look like before it is said how many rows it fetches: layers left dense, directions of the tail.

Both take device memory, which a bound limits; neither sends a byte over the link. So for each number of dense layers
only the largest tail that stays within the bound is worth a try.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import step_logits
from kcache.errors import InputError
from kcache.evaluate.fidelity import Case
from kcache.evaluate.forks import FULL
from kcache.planning.sizes import TierSizes, least_resident
from kcache.policy import Policy

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

_DENSE_LAYERS = (0, 1, 2, 3, 4, 6, 8)
_TAIL_PARTS = (4, 3, 2, 1)
"""Directions of the tail to choose from, in 32nds of the head size, most first."""


@dataclass(frozen=True)
class Shape:
    """A policy but for its N.

    Attributes
    ----------
    name : str
    policy : Policy
        With any N.
    layers : int
        How many layers are offloaded, which N rows cost in proportion to.
    """

    name: str
    policy: Policy
    layers: int

    def case(self, topn: int) -> Case:
        """The policy with this N."""
        return Case(self.name, self.policy.replace(topn=topn))


def find_shapes(lm: LoadedModel, base: Policy, length: int, most: float) -> list[Shape]:
    """The shapes to try, likely winners first: as many dense layers as ``base`` has, then from most to fewest.

    Parameters
    ----------
    lm : LoadedModel
    base : Policy
        What they differ from only in ``dense_layers`` and ``tail_rank``; without the tail, picked weights are rescaled.
        A tail of another kind than the low-rank one stays as it is.
    length : int
        Rows in the cache.
    most : float
        Bytes on the device beside K, as a share of a full KV cache.

    Raises
    ------
    InputError
        If no layer of the model can be offloaded, ``length`` rows are too few to be offloaded, or none stays within
        ``most``.
    """
    if length < base.dense_below:
        raise InputError(
            f"below {base.dense_below:,} tokens the policy attends exactly and fetches nothing; use more "
            f"than {length:,}, or a policy with a smaller dense_below"
        )
    tensors = _a_row(lm)
    found = []
    for dense in sorted({base.dense_layers, *_DENSE_LAYERS}, key=lambda dense: (dense != base.dense_layers, -dense)):
        fitting = (
            Shape(_name(policy), policy, tensors.layers - dense)
            for policy in _with_tails(base.replace(dense_layers=dense), tensors.dim)
            if dense < tensors.layers and tensors.overhead(policy, length) <= most
        )
        found += [*fitting][:1]
    if not found:
        raise InputError(
            f"no number of dense layers stays within {most:.1%} of a full KV cache on the device; allow more "
            "device_overhead, or give a policy with a cheaper tail"
        )
    return found


@dataclass(frozen=True)
class _Tensors:
    """The layers that may be offloaded, and what each holds of one token: bytes of K and V, heads and their size."""

    layers: int
    k_row: int
    v_row: int
    heads: int
    dim: int

    def overhead(self, policy: Policy, length: int) -> float:
        """Bytes on the device beside K at ``length`` rows, as a share of a full KV cache."""
        sizes = TierSizes.of(
            policy, self.layers, self.k_row, self.v_row, self.dim, self.v_row // (self.heads * self.dim)
        )
        resident = least_resident(policy, self.layers)
        beside = sizes.device(length, resident) - sizes.k(length, resident)
        return beside / (self.layers * (self.k_row + self.v_row) * length)


def _a_row(lm: LoadedModel) -> _Tensors:
    """Let the model keep one token, and look."""
    cache = KCache(lm.model, FULL, max_length=1)
    with attach(lm.model):
        step_logits(lm.model, cache, torch.zeros(1, 1, dtype=torch.long, device=lm.device))
    for layer in cache.tiered_layers:
        if layer.keys is not None and layer.values is not None:
            k, v = layer.keys, layer.values
            heads, dim, size = v.shape[1], v.shape[3], v.element_size()
            k_row = k.shape[1] * k.shape[3] * k.element_size()
            return _Tensors(len(cache.tiered_layers), k_row, heads * dim * size, heads, dim)
    raise InputError(f"no layer of {lm.name} can be offloaded, so there is nothing to choose")


def _with_tails(policy: Policy, dim: int) -> Iterator[Policy]:
    """The policy with each tail it may have, largest first."""
    if policy.tail != "lowrank":
        yield policy
        return
    for rank in dict.fromkeys(dim * part // 32 for part in _TAIL_PARTS):
        if rank:
            yield policy.replace(tail_rank=rank)
    yield policy.replace(tail="renormalise", tail_rank=None)


def _name(policy: Policy) -> str:
    """A shape in words."""
    tail = f"tail of {policy.tail_rank}" if policy.tail == "lowrank" else "no tail"
    return f"{policy.dense_layers} dense, {tail}"
