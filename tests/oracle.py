"""A brute-force oracle: TopN attention from its definition, over the full K and V that a stock cache holds.

It shares no code with kcache. It runs as an attention function of its own on a DynamicCache, in fp64, and writes the
tail down row by row: an unpicked row weighs what it did and is replaced by what it is in a few directions (the cache's
own, which tests/tiers/test_lowrank.py holds against an eigendecomposition).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kcache.policy import Policy
from tests.pair import Pair, forward

NAME = "test_oracle"


def topn_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    policy: Policy,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    threshold: float | None = None,
    directions: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[set[int]], torch.Tensor]:
    """One sequence, one KV head: query ``[G, D]``, keys ``[L, D]``, values ``[L, Dv]``, valid ``[L]``, sinks ``[G]``.

    Returns the output ``[G, Dv]``, each head's picks that hold weight, and their mass ``[G]``.
    """
    scores = query.double() @ keys.double().T * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    exp = torch.where(valid, (scores - scores.max()).exp(), 0.0)
    total = exp.sum(-1)
    if sinks is not None:
        total = total + (sinks.double() - scores.max()).exp()
    probs = exp / total[:, None]
    count = min(policy.topn, len(keys))
    wanted = probs.amax(0, keepdim=True).expand_as(probs) if policy.select == "group" else probs
    most = count if threshold is None else 8 * count
    picked = torch.zeros_like(probs, dtype=torch.bool).scatter(1, wanted.argsort(1, descending=True)[:, :most], True)
    if threshold is not None:
        picked &= wanted > threshold
    picked &= valid
    rows = torch.where(valid[:, None], values.double(), 0.0)
    weights = probs * picked
    mass = weights.sum(1)
    if policy.tail == "renormalise":
        weights = weights * probs.sum(1, keepdim=True) / mass[:, None].clamp(min=1e-300)
    elif policy.tail == "lowrank":
        assert directions is not None
        base, basis = (part.double() for part in directions)
        rest = probs * ~picked * valid
        stand_ins = base + rows @ basis.T @ basis
        picks = [set(row.nonzero()[:, 0].tolist()) for row in picked]
        return weights @ rows + rest @ stand_ins, picks, mass
    picks = [set(row.nonzero()[:, 0].tolist()) for row in picked]
    return weights @ rows, picks, mass


class OraclePair(Pair):
    """A KCache beside the oracle; TopN may be as small as you like."""

    def __init__(self, model: PreTrainedModel, policy: Policy, **options: Any) -> None:
        policy = policy.replace(spread="even")
        super().__init__(model, policy, **{"tolerance": 1e-4, **options})
        self.policy = policy
        self.exact = False
        self.tiered = {layer.index for layer in self.ours.tiered_layers[policy.dense_layers :]}
        self.picks: dict[int, list[list[list[set[int]]]]] = {}
        self.masses: dict[int, torch.Tensor] = {}

    def stock_forward(self, ids: torch.Tensor, mask: torch.Tensor | None, **extra: Any) -> torch.Tensor:
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, _whole_mask)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        try:
            return forward(self.model, self.stock, ids, mask, **extra)
        finally:
            self.model.set_attn_implementation(before)

    def compare_picks(self) -> None:
        """The snapshot's picks and mass are the oracle's."""
        snapshot = self.ours.snapshot()
        assert self.picks, "no TopN step was run"
        for index, picks in self.picks.items():
            layer = snapshot.layers[index]
            assert layer.mode == "topn"
            assert layer.picks is not None
            assert layer.mass is not None
            torch.testing.assert_close(
                torch.from_numpy(layer.mass.copy()), self.masses[index].float(), atol=1e-4, rtol=0
            )
            for b, heads in enumerate(picks):
                for h, groups in enumerate(heads):
                    for g, want in enumerate(groups):
                        got = layer.picks[b, h] if layer.picks.ndim == 3 else layer.picks[b, h, g]
                        assert len(set(got.tolist())) == len(got), "a row was picked twice"
                        assert want <= set(got.tolist())

    def _directions(self, layer: int, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Base and basis that the cache has fitted for a head."""
        state = self.ours.layers[layer]._v.tail.state()
        return state.base[b, h], state.basis[b, h]

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        *args: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        batch, heads, count, _ = query.shape
        kv_heads, length = key.shape[1:3]
        group = heads // kv_heads
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        sparse = module.layer_idx in self.tiered and count == 1 and not self.exact and length >= self.policy.dense_below
        if sparse:
            outs, picks, masses = [], [], []
            for b in range(batch):
                for h in range(kv_heads):
                    own = slice(h * group, (h + 1) * group)
                    directions = self._directions(module.layer_idx, b, h) if self.policy.tail == "lowrank" else None
                    out, chosen, mass = topn_attention(
                        query[b, own, 0],
                        key[b, h],
                        value[b, h],
                        mask[b, 0, 0],
                        self.policy,
                        scaling,
                        softcap,
                        None if sinks is None else sinks[own],
                        directions=directions,
                    )
                    outs.append(out)
                    picks.append(chosen)
                    masses.append(mass)
            self.picks[module.layer_idx] = [picks[b * kv_heads : (b + 1) * kv_heads] for b in range(batch)]
            self.masses[module.layer_idx] = torch.stack(masses).view(batch, kv_heads, group)
            return torch.cat(outs).view(batch, 1, heads, -1).to(query.dtype), None
        self.picks.pop(module.layer_idx, None)
        key, value = (rows.double().repeat_interleave(group, 1) for rows in (key, value))
        scores = query.double() @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~mask, -1e30)
        if sinks is not None:
            extra = sinks.double().view(1, -1, 1, 1).expand(batch, -1, count, 1)
            scores = torch.cat([scores, extra], -1)
        probs = scores.softmax(-1)[..., :length]
        return (probs @ value).transpose(1, 2).to(query.dtype), None


def _whole_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    mask: torch.Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask
