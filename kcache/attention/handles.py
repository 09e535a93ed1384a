"""What a layer leaves on the V tensor that ``update`` returns, for the attention function to find.

``update`` never sees the queries and attention never sees the cache; a handle joins the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Handle(Protocol):
    """What ``update`` hands to the attention function, as an attribute of the V tensor."""

    def attend(self, module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        """Answer the attention function's call; returns ``[B, Hq, Q, Dv]``."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of one call of the attention function: q ``[B, Hq, Q, D]``, this chunk's K and V, the mask."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def with_handle(values: torch.Tensor, handle: Handle) -> torch.Tensor:
    """V under a tensor of its own that carries what the attention function looks for."""
    values = values.view(values.shape)
    values._kcache = handle  # type: ignore[attr-defined]
    return values
