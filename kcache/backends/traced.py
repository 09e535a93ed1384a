"""Whether a call may be answered by code of our own, or somebody looks on who wants torch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def wants_operators(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether what is done to these is traced, learnt from or stood in for: what has no address cannot be read."""
    if torch.compiler.is_compiling():
        return True
    internals: Any = torch._C
    if internals._get_tracing_state() is not None or internals._are_functorch_transforms_active():
        return True
    if is_in_torch_dispatch_mode():
        return True
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True  # there is no gradient of it
    return any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
