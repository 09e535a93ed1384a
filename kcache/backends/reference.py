"""The reference backend: the four verbs in plain torch operators, on any device. It defines what is right.

Everything after the loads is fp32. On a CUDA device ``fetch`` gathers on the host, which waits for the picks: right,
and slow. Formulas: see ``docs/design.md``, "One decode step".
"""

from __future__ import annotations

import torch

from kcache.backends import dense
from kcache.backends.base import MOST, DecodeResult, DecodeStep, HotStore, count_picks
from kcache.backends.rounding import LOWER_STEPS


class ReferenceBackend:
    """Score, select, fetch and combine in torch operators."""

    name = "reference"
    reads_host_by_kernel = False

    def decode(self, step: DecodeStep) -> DecodeResult:
        """Run the four verbs for one layer."""
        scores = None if step.narrow is None or step.narrow.lower is None else self.products(step)
        probs = self.score(step) if scores is None else probabilities(scores, step)
        picks = self.select(probs, step)
        count_picks(picks, step)
        if scores is not None:
            probs = self.refine(scores, picks, step)
        rows = self.fetch(picks, step)
        return self.combine(probs, picks, rows, step)

    def keep_hot(self, step: DecodeStep) -> HotStore | None:
        """None: V is gathered in RAM."""
        return None

    def dense(self, step: DecodeStep) -> torch.Tensor:
        """Exact attention over K and V on the device, ``[B, Hq, Dv]``."""
        mask = None if step.mask is None else step.mask[:, None, None, :]
        keys, values = step.keys[:, :, : step.length], step.values[:, :, : step.length]
        query = step.query.unsqueeze(2)
        return dense.attend(query, keys, values, mask, step.scaling, step.softcap, step.sinks)[:, :, 0]

    def products(self, step: DecodeStep) -> torch.Tensor:
        """Scores of every row, ``[B, Hkv, G, L]`` fp32, neither soft-capped nor masked."""
        keys = step.keys[:, :, : step.length].float()
        if step.narrow is not None:
            keys = keys * step.narrow.scales[:, :, : step.length, None] + step.narrow.centre.unsqueeze(2)
        query = step.query.float().unflatten(1, (keys.shape[1], -1))
        return torch.matmul(query, keys.transpose(2, 3)) * step.scaling

    def score(self, step: DecodeStep) -> torch.Tensor:
        """Attention probabilities of every row, ``[B, Hkv, G, at least L]`` fp32; 0 where masked and from L on."""
        return probabilities(self.products(step), step)

    def refine(self, scores: torch.Tensor, picks: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """Probabilities as they are if the picked rows are scored by both planes of K, all others by the upper one.

        ``scores`` are :meth:`products`.
        """
        assert step.narrow is not None and step.narrow.lower is not None
        batch, heads, group, _ = scores.shape
        per_head = picks if picks.dim() == 4 else picks.unsqueeze(2).expand(-1, -1, group, -1)
        flat = per_head.flatten(2).clamp(min=0)
        index = flat.unsqueeze(-1).expand(-1, -1, -1, step.keys.shape[-1])
        steps = step.narrow.lower.gather(2, index).float() / LOWER_STEPS
        rows = (steps * step.narrow.scales.gather(2, flat).unsqueeze(-1)).unflatten(2, (group, -1))
        query = step.query.float().view(batch, heads, group, 1, -1)
        more = ((query * rows).sum(-1) * step.scaling).masked_fill(per_head < 0, 0)
        return probabilities(scores.scatter_add(3, per_head.clamp(min=0), more), step)

    def select(self, probs: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """Positions of the largest probabilities (the largest of the group), ``[B, Hkv, N]`` or ``[B, Hkv, G, N]``."""
        weight = (probs.amax(2) if step.policy.select == "group" else probs)[..., : step.length]
        count = min(step.policy.topn, step.length)
        if step.threshold is None:
            return weight.topk(count, sorted=False).indices
        least = step.threshold.view(-1, *[1] * (weight.dim() - 1))
        wanted = int((weight > least).sum(-1).max())
        largest = weight.topk(max(1, min(wanted, MOST * count, step.length)))
        return largest.indices.masked_fill(largest.values <= least, -1)

    def fetch(self, picks: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """The picked V rows on the device, ``[B, Hkv, N, Dv]`` or ``[B, Hkv, G, N, Dv]``."""
        batch, heads = picks.shape[:2]
        flat = picks.reshape(batch, heads, -1).clamp(min=0).to(step.values.device)
        index = flat.unsqueeze(-1).expand(-1, -1, -1, step.values.shape[-1])
        rows = step.values[:, :, : step.length].gather(2, index).to(step.query.device)
        if step.value_scales is not None:
            rows = rows.float() * step.value_scales.gather(2, flat.to(step.query.device)).unsqueeze(-1)
        return rows.reshape(*picks.shape, -1)

    def combine(self, probs: torch.Tensor, picks: torch.Tensor, rows: torch.Tensor, step: DecodeStep) -> DecodeResult:
        """Weigh the picked rows, add the tail. May overwrite ``probs``."""
        group = probs.shape[2]
        per_head = picks if picks.dim() == 4 else picks.unsqueeze(2).expand(-1, -1, group, -1)
        if step.threshold is None:
            weights = probs.gather(3, per_head)
        else:
            missing = per_head < 0
            per_head = per_head.masked_fill(missing, 0)
            weights = probs.gather(3, per_head).masked_fill_(missing, 0)
        mass = weights.sum(-1)
        each = weights if picks.dim() == 4 else weights.mean(2)
        tail = None
        if step.policy.tail == "renormalise":
            # What a sink takes stays with it.
            whole = 1 if step.sinks is None else probs[..., : step.length].sum(-1, keepdim=True)
            weights = weights * (whole / mass.unsqueeze(-1).clamp(min=torch.finfo(torch.float32).tiny))
        elif step.policy.tail == "lowrank":
            tail = self.lowrank(probs.scatter_add_(3, per_head, -weights), step)
        if picks.dim() == 4:
            out = torch.matmul(weights.unsqueeze(3), rows.float()).squeeze(3)
        else:
            out = torch.matmul(weights, rows.float())
        if tail is not None:
            out = out + tail
        return DecodeResult(out.flatten(1, 2).to(step.query.dtype), picks, mass, each)

    def lowrank(self, rest: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """What rows contribute by their directions, weighed by ``rest`` ``[B, Hkv, G, at least L]``, 0 at the picks."""
        tail = step.lowrank
        assert tail is not None
        rest = rest[..., : step.length]
        along = torch.matmul(rest, tail.coefficients[..., : step.length].float().transpose(2, 3))
        return rest.sum(-1, keepdim=True) * tail.base.unsqueeze(2) + torch.matmul(along, tail.basis)


def capped(scores: torch.Tensor, step: DecodeStep) -> torch.Tensor:
    """Scores, soft-capped if the step has them so."""
    return scores if step.softcap is None else torch.tanh(scores / step.softcap) * step.softcap


def probabilities(scores: torch.Tensor, step: DecodeStep) -> torch.Tensor:
    """Soft-cap, mask and normalise scores ``[B, Hkv, G, L]`` fp32; an all-masked sequence gets zeros."""
    scores = capped(scores, step)
    if step.mask is not None:
        scores = scores.masked_fill(~step.mask[:, None, None, :], float("-inf"))
    if step.sinks is not None:
        sinks = step.sinks.float().view(1, scores.shape[1], scores.shape[2], 1).expand(scores.shape[0], -1, -1, 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1].contiguous()
    probs = torch.softmax(scores, -1)
    return probs if step.mask is None else probs.nan_to_num(0.0)
