"""Random decode steps and what they must give, in plain fp64 torch written from the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass
class Problem:
    """One decode step's inputs; see ``kcache.backends.base.DecodeStep`` for the shapes."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: int
    scaling: float
    topn: int
    tail: str = "block"
    tail_block: int = 16
    select: str = "group"
    mask: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    means: torch.Tensor | None = None

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.keys.shape[1]

    def to(self, device: torch.device) -> Problem:
        """Move everything but V, which is pinned where there is a device."""
        moved = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value) and name != "values"
        }
        values = self.values.pin_memory() if device.type == "cuda" else self.values
        return replace(self, values=values, **moved)


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
    tail: str = "block",
    tail_block: int = 16,
    select: str = "group",
    padded: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    sharpness: float = 2.0,
    seed: int = 0,
) -> Problem:
    """Draw a problem. Rows past the length are NaN: nothing may read them."""
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
        tail_block=tail_block,
        select=select,
        mask=mask,
        softcap=softcap,
        sinks=normal(kv_heads * group) if sinks else None,
    )
    problem.means = block_means(problem, capacity)
    return problem


def valid_rows(problem: Problem) -> torch.Tensor:
    """Bool ``[B, length]``."""
    if problem.mask is None:
        return torch.ones(problem.query.shape[0], problem.length, dtype=torch.bool, device=problem.query.device)
    return problem.mask[:, : problem.length]


def block_means(problem: Problem, capacity: int) -> torch.Tensor:
    """Means of the valid rows of each block, in V's dtype; NaN for blocks past the length."""
    block, length = problem.tail_block, problem.length
    valid = valid_rows(problem)[:, None, :, None].double()
    batch, heads, _, dim = problem.values.shape
    means = torch.full((batch, heads, -(-capacity // block), dim), float("nan"), dtype=torch.float64)
    for first in range(0, length, block):
        rows = slice(first, min(first + block, length))
        total = (problem.values[:, :, rows].double() * valid[:, :, rows]).sum(2)
        means[:, :, first // block] = total / valid[:, :, rows].sum(2).clamp(min=1)
    return means.to(problem.values.dtype)


def probabilities(problem: Problem) -> torch.Tensor:
    """``[B, Hkv, G, length]`` fp64."""
    keys = problem.keys[:, :, : problem.length].double()
    query = problem.query.double().unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("bhgd,bhld->bhgl", query, keys) * problem.scaling
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~valid_rows(problem)[:, None, None], float("-inf"))
    if problem.sinks is not None:
        sinks = problem.sinks.double().view(1, scores.shape[1], -1, 1).expand(scores.shape[0], -1, -1, 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).nan_to_num(0.0)


def expected(problem: Problem, picks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out [B, Hq, Dv], mass [B, Hkv, G])`` in fp64, given the picks ``[B, Hkv, n]`` or ``[B, Hkv, G, n]``."""
    probs = probabilities(problem)
    values = problem.values[:, :, : problem.length].double().to(probs.device)
    valid = valid_rows(problem)
    values = torch.where(valid[:, None, :, None], values, 0.0)
    picks = picks.long().to(probs.device)
    if picks.dim() == 3:
        picks = picks.unsqueeze(2).expand(-1, -1, problem.group, -1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(3, picks, True)
    weights = torch.where(chosen, probs, 0.0)
    mass = weights.sum(-1)
    if problem.tail == "renormalise":
        weights = weights / mass.unsqueeze(-1).clamp(min=1e-30)
    out = torch.einsum("bhgl,bhld->bhgd", weights, values)
    if problem.tail == "block":
        assert problem.means is not None
        rest = torch.where(chosen, 0.0, probs)
        for first in range(0, problem.length, problem.tail_block):
            left = rest[..., first : first + problem.tail_block].sum(-1)
            mean = problem.means[:, :, first // problem.tail_block].double()
            out = out + left.unsqueeze(-1) * mean.unsqueeze(2)
    return out.flatten(1, 2), mass


def dense(problem: Problem) -> torch.Tensor:
    """Full attention, ``[B, Hq, Dv]`` fp64."""
    values = problem.values[:, :, : problem.length].double().to(problem.query.device)
    return torch.einsum("bhgl,bhld->bhgd", probabilities(problem), values).flatten(1, 2)


def check_picks(problem: Problem, picks: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The picks are distinct, within the length, and hold the N largest weights up to ``tolerance``."""
    probs = probabilities(problem)
    weight = probs.amax(2) if problem.select == "group" else probs
    count = min(problem.topn, problem.length)
    best = weight.topk(count, dim=-1).values
    picks = picks[..., :count].long().to(weight.device)
    assert picks.min() >= 0
    assert picks.max() < problem.length
    assert all(len(set(row)) == count for row in picks.flatten(0, -2).tolist())
    got = weight.gather(-1, picks).sort(-1, descending=True).values
    torch.testing.assert_close(got, best, rtol=tolerance, atol=1e-9)


def assert_near(actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative error of the whole tensor, within what the dtype's rounding explains; NaN never passes."""
    limit = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    error = (actual.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-12)
    assert error <= limit, f"relative error {error:.2e}, at most {limit:.0e} expected"
