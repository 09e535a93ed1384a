"""Exact attention written out: what fused kernels do not know, and what they are compared with.

Shapes as in :mod:`kcache.backends.dense`.
"""

from __future__ import annotations

import torch

_SCORE_BYTES = 256 * 2**20


def plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention written out in fp32, a slice of queries at a time so the scores stay small."""
    batch, heads, count, _ = query.shape
    length = keys.shape[2]
    grouped_keys = keys.float().unsqueeze(2)
    grouped_values = values.float().unsqueeze(2)
    step = max(1, _SCORE_BYTES // max(1, batch * heads * length * 4))
    out = query.new_empty(batch, heads, count, values.shape[-1])
    columns = torch.arange(length, device=query.device)
    for start in range(0, count, step):
        part = query[:, :, start : start + step].float().unflatten(1, (keys.shape[1], -1))
        scores = torch.matmul(part, grouped_keys.transpose(3, 4)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            rows = torch.arange(start, start + part.shape[3], device=query.device) + length - count
            scores = scores.masked_fill(columns[None, :] > rows[:, None], float("-inf"))
        else:
            piece = mask[:, :, start : start + step].expand(-1, heads, -1, -1).unflatten(1, (keys.shape[1], -1))
            if piece.dtype == torch.bool:
                scores = scores.masked_fill(~piece, float("-inf"))
            else:
                scores = scores + piece
        if sinks is not None:
            extra = sinks.float().view(1, scores.shape[1], -1, 1, 1).expand(batch, -1, -1, scores.shape[3], 1)
            probs = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
        else:
            probs = torch.softmax(scores, -1)
        if mask is not None:
            probs = probs.nan_to_num(0.0)
        out[:, :, start : start + step] = torch.matmul(probs, grouped_values).flatten(1, 2).to(query.dtype)
    return out


def repeat(rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, L, D]`` with each head repeated for its group, ``[B, Hq, L, D]``."""
    group = query.shape[1] // rows.shape[1]
    return rows if group == 1 else rows.repeat_interleave(group, dim=1)
