"""Attention masks as a layer of a cache reads them."""

from __future__ import annotations

import torch


def rows_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A row mask ``[B, 1, 1, L]`` as ``[B, L]``."""
    return None if mask is None else mask[:, 0, 0]


def is_row_mask(mask: torch.Tensor | None) -> bool:
    """Whether one query's mask says, for all heads alike, which rows it may attend, and nothing more."""
    return mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)


def plain_rows(mask: torch.Tensor | None, allowed: torch.Tensor | None) -> torch.Tensor | None:
    """One query's mask, as bool if it is additive and adds nothing to what it allows; reads it then.

    ``allowed`` is what :func:`as_bool` says of it.
    """
    if mask is None or allowed is None or mask.dtype == torch.bool:
        return mask
    return allowed if bool((mask == 0).logical_or(~allowed).all()) else mask


def as_bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as bool ``[B, 1, Q, L]``; an additive one attends where it is above half of its dtype's minimum."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
