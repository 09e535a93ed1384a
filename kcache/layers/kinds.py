"""What all rows of a layer have in common, so that rows of another model, or of one that has changed, are refused."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kcache.errors import CacheStateError


class RowKind(NamedTuple):
    """Heads, head size and type of a layer's K and V."""

    key_heads: int
    key_size: int
    key_dtype: torch.dtype
    value_heads: int
    value_size: int
    value_dtype: torch.dtype

    @classmethod
    def of(cls, index: int, keys: torch.Tensor, values: torch.Tensor) -> RowKind:
        """What K ``[B, Hkv, T, D]`` and V ``[B, Hkv, T, Dv]`` of layer ``index`` are.

        Raises
        ------
        CacheStateError
            If they are shaped otherwise, or differ in sequences or tokens.
        """
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[::2] != values.shape[::2]:
            raise CacheStateError(
                f"layer {index} was given K {list(keys.shape)} and V {list(values.shape)}; both must be "
                "[sequences, KV heads, tokens, head size], of the same sequences and tokens"
            )
        return cls(keys.shape[1], keys.shape[3], keys.dtype, values.shape[1], values.shape[3], values.dtype)

    def check(self, index: int, given: RowKind) -> None:
        """Raise :class:`CacheStateError` unless new rows of layer ``index`` are of this kind."""
        if given != self:
            raise CacheStateError(
                f"layer {index} of this cache holds {self}, and was given {given}; after a change of the model reset "
                "the cache, or make a new one"
            )

    def __str__(self) -> str:
        return (
            f"K of {self.key_heads} heads of {self.key_size} in {self.key_dtype} and V of {self.value_heads} heads of "
            f"{self.value_size} in {self.value_dtype}"
        )
