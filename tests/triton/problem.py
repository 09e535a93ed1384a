"""Random decode steps and what they must give, in plain fp64 torch written from the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kcache.backends.base import MOST, LowRank, NarrowKeys
from kcache.backends.rounding import quantise, remainder
from kcache.tiers.lowrank import LowRankTail


@dataclass
class Problem:
    """One decode step's inputs; see ``kcache.backends.base.DecodeStep`` for the shapes."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: int
    scaling: float
    topn: int
    tail: str = "lowrank"
    select: str = "group"
    mask: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    lowrank: LowRank | None = None
    threshold: torch.Tensor | None = None
    narrow: NarrowKeys | None = None
    value_scales: torch.Tensor | None = None

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.keys.shape[1]

    def to(self, device: torch.device) -> Problem:
        """Move everything but V, which is pinned where there is a device."""
        moved = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value) and name != "values"
        }
        values = self.values.pin_memory() if device.type == "cuda" else self.values
        tail = self.lowrank
        if tail is not None:
            tail = LowRank(tail.base.to(device), tail.basis.to(device), tail.coefficients.to(device))
        narrow = None if self.narrow is None else NarrowKeys(*(each.to(device) for each in self.narrow.tensors()))
        return replace(self, values=values, lowrank=tail, narrow=narrow, **moved)


def make_problem(
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 64,
    dim_v: int | None = None,
    length: int = 100,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
    topn: int = 8,
    tail: str = "lowrank",
    rank: int | None = None,
    select: str = "group",
    padded: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    sharpness: float = 2.0,
    seed: int = 0,
    threshold: float | None = None,
    k_bits: int | str = 16,
    v_bits: int = 16,
) -> Problem:
    """Draw a problem. Rows past the length are NaN: nothing may read them.

    ``threshold`` is what share of the rows of the head that has most lie above it; sequences differ.
    """
    generator = torch.Generator().manual_seed(seed)
    capacity = capacity or length + 7
    dim_v = dim_v or dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    keys, values = normal(batch, kv_heads, capacity, dim), normal(batch, kv_heads, capacity, dim_v)
    keys[:, :, length:], values[:, :, length:] = float("nan"), float("nan")
    mask = None
    if padded:
        pads = torch.randint(0, max(1, length // 2), (batch, 1), generator=generator)
        mask = torch.arange(length).expand(batch, -1) >= pads
        mask = mask & (torch.rand(batch, length, generator=generator) > 0.1)
        mask[:, -1] = True
    problem = Problem(
        query=(normal(batch, kv_heads * group, dim) * sharpness).to(dtype),
        keys=keys.to(dtype),
        values=values.to(dtype),
        length=length,
        scaling=dim**-0.5,
        topn=topn,
        tail=tail,
        select=select,
        mask=mask,
        softcap=softcap,
        sinks=normal(kv_heads * group) if sinks else None,
    )
    if tail == "lowrank":
        problem.lowrank = fit_tail(problem, rank)
    if k_bits != 16:
        exact, centre = problem.keys, normal(batch, kv_heads, dim)
        problem.keys, scales = in_bytes(exact, length, centre)
        lower = None
        if k_bits == "8+8":
            lower = remainder(exact.nan_to_num(0.0), problem.keys, scales.unsqueeze(3), centre)
            lower[:, :, length:] = 77
        problem.narrow = NarrowKeys(scales, centre, lower)
    if v_bits == 8:
        problem.values, problem.value_scales = in_bytes(problem.values, length)
    if threshold is not None:
        problem.threshold = draw_threshold(problem, threshold)
    return problem


def in_bytes(rows: torch.Tensor, length: int, centre: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and scales in 8 bits; past the length rows are full of 77 and scales NaN."""
    whole, scales = quantise(rows.nan_to_num(0.0), centre)
    whole[:, :, length:], scales[:, :, length:] = 77, float("nan")
    return whole, scales.squeeze(3)


def wide(rows: torch.Tensor, scales: torch.Tensor | None, length: int) -> torch.Tensor:
    """The first ``length`` rows ``[B, Hkv, length, D]`` in fp64, whatever they are kept in."""
    rows = rows[:, :, :length].double()
    return rows if scales is None else rows * scales[:, :, :length, None].double().to(rows.device)


def fit_tail(problem: Problem, rank: int | None = None) -> LowRank:
    """The tail of a problem's valid rows, in buffers as large as K's; NaN past the length."""
    directions = LowRankTail(rank, problem.values.device)
    mask = None if problem.mask is None else problem.mask[:, : problem.length].to(problem.values.device)
    directions.append(problem.values[:, :, : problem.length], mask, 0)
    state = directions.state()
    batch, heads, capacity, _ = problem.values.shape
    room = torch.full((batch, heads, state.basis.shape[2], capacity), float("nan"), dtype=problem.values.dtype)
    room[..., : problem.length] = state.coefficients[..., : problem.length]
    return LowRank(state.base, state.basis, room)


def draw_threshold(problem: Problem, share: float) -> torch.Tensor:
    """A threshold ``[B]`` in the middle of the widest gap near the wanted one, so that rounding decides nothing."""
    least = []
    for weights in row_weights(problem).flatten(1).float():
        ranked = weights[weights > 0].sort(descending=True).values
        if len(ranked) < 2:
            least.append(torch.tensor(0.5))
            continue
        at = min(len(ranked) - 2, int(share * len(ranked)))
        near = ranked[max(0, at - 3) : at + 4]
        widest = int((near[:-1] / near[1:]).argmax())
        least.append((near[widest] * near[widest + 1]).sqrt())
    return torch.stack(least)


def row_weights(problem: Problem) -> torch.Tensor:
    """What selection goes by, ``[B, Hkv, length]`` or ``[B, Hkv, G, length]`` fp64."""
    probs = probabilities(problem)
    return probs.amax(2) if problem.select == "group" else probs


def valid_rows(problem: Problem) -> torch.Tensor:
    """Bool ``[B, length]``."""
    if problem.mask is None:
        return torch.ones(problem.query.shape[0], problem.length, dtype=torch.bool, device=problem.query.device)
    return problem.mask[:, : problem.length]


def probabilities(problem: Problem, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """``[B, Hkv, G, length]`` fp64; of K in two planes by the upper one, where ``chosen`` by both."""
    narrow = problem.narrow
    keys = wide(problem.keys, None if narrow is None else narrow.scales, problem.length)
    keys = keys if narrow is None else keys + narrow.centre.double().unsqueeze(2)
    query = problem.query.double().unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("bhgd,bhld->bhgl", query, keys) * problem.scaling
    if chosen is not None and narrow is not None and narrow.lower is not None:
        lower = wide(narrow.lower, narrow.scales, problem.length) / 254
        scores += torch.einsum("bhgd,bhld->bhgl", query, lower) * problem.scaling * chosen
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~valid_rows(problem)[:, None, None], float("-inf"))
    if problem.sinks is not None:
        sinks = problem.sinks.double().view(1, scores.shape[1], -1, 1).expand(scores.shape[0], -1, -1, 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).nan_to_num(0.0)


def expected(problem: Problem, picks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out [B, Hq, Dv], mass [B, Hkv, G])`` in fp64, given the picks ``[B, Hkv, n]`` or ``[B, Hkv, G, n]``."""
    values = wide(problem.values, problem.value_scales, problem.length).to(problem.query.device)
    valid = valid_rows(problem)
    values = torch.where(valid[:, None, :, None], values, 0.0)
    picks = picks.long().to(values.device)
    if picks.dim() == 3:
        picks = picks.unsqueeze(2).expand(-1, -1, problem.group, -1)
    # -1, which fills picks up, falls on a column of its own.
    places = torch.where(picks < 0, problem.length, picks)
    chosen = torch.zeros(*picks.shape[:3], problem.length + 1, dtype=torch.bool, device=values.device)
    chosen = chosen.scatter_(3, places, True)[..., :-1]
    probs = probabilities(problem, chosen)
    weights = torch.where(chosen, probs, 0.0)
    mass = weights.sum(-1)
    if problem.tail == "renormalise":
        weights = weights * probs.sum(-1, keepdim=True) / mass.unsqueeze(-1).clamp(min=1e-30)
    out = torch.einsum("bhgl,bhld->bhgd", weights, values)
    if problem.tail == "lowrank":
        tail = problem.lowrank
        assert tail is not None
        rest = torch.where(chosen, 0.0, probs)
        coefficients = tail.coefficients[..., : problem.length].double()
        along = torch.einsum("bhgl,bhrl->bhgr", rest, coefficients)
        out = out + rest.sum(-1, keepdim=True) * tail.base.double().unsqueeze(2)
        out = out + torch.einsum("bhgr,bhrd->bhgd", along, tail.basis.double())
    return out.flatten(1, 2), mass


def dense(problem: Problem) -> torch.Tensor:
    """Full attention, ``[B, Hq, Dv]`` fp64."""
    values = problem.values[:, :, : problem.length].double().to(problem.query.device)
    return torch.einsum("bhgl,bhld->bhgd", probabilities(problem), values).flatten(1, 2)


def check_picks(problem: Problem, picks: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The picks are distinct, within the length, and hold the largest weights up to ``tolerance``, as many as wanted.

    Wanted are N, or all above the threshold, but no more than M.
    """
    weight = row_weights(problem)
    width = weight.shape[-1]
    if problem.threshold is None:
        counts = torch.full(weight.shape[:-1], min(problem.topn, width), device=weight.device)
    else:
        least = problem.threshold.view(-1, *[1] * (weight.dim() - 1))
        counts = (weight.float() > least).sum(-1).clamp(max=min(MOST * problem.topn, width))
    assert picks.max() < width
    assert torch.equal((picks >= 0).sum(-1), counts)
    for row, positions, count in zip(weight.flatten(0, -2), picks.flatten(0, -2), counts.flatten(), strict=True):
        got = positions[: int(count)].long().to(row.device)
        assert (got >= 0).all(), "picks come first, -1 after them"
        assert len(set(got.tolist())) == count
        torch.testing.assert_close(
            row[got].sort(descending=True).values, row.topk(int(count)).values, rtol=tolerance, atol=1e-9
        )


def assert_near(actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative error of the whole tensor, within what the dtype's rounding explains; NaN never passes."""
    limit = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    error = (actual.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-12)
    assert error <= limit, f"relative error {error:.2e}, at most {limit:.0e} expected"
