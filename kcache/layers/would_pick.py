"""What a TopN step would pick in a layer that attends exactly: shown to viewers of short contexts who ask for it."""

from __future__ import annotations

import torch

from kcache.backends.base import DecodeStep
from kcache.backends.reference import ReferenceBackend


def would_pick(step: DecodeStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score and select; nothing is fetched.

    Returns
    -------
    Tensor ``[B, Hkv, N]`` or ``[B, Hkv, G, N]``, Tensor ``[B, Hkv, G]``, Tensor
        Picks, the probability they would hold together, and each of them.
    """
    verbs = ReferenceBackend()
    probs = verbs.score(step)
    picks = verbs.select(probs, step)
    per_head = picks if picks.dim() == 4 else picks.unsqueeze(2).expand(-1, -1, probs.shape[2], -1)
    weights = probs.gather(3, per_head)
    return picks, weights.sum(-1), weights if picks.dim() == 4 else weights.mean(2)
