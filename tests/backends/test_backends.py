"""Every backend that runs on the CPU computes the reference's decode step, on random shapes, types, masks and ties."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.backends import DecodeStep, choose_backend
from kcache.backends import cpu as cpu_backend
from kcache.backends.base import MOST, DecodeResult
from kcache.backends.cpu import CpuBackend
from kcache.backends.dense import attend
from kcache.backends.reference import ReferenceBackend
from kcache.errors import PolicyError
from kcache.policy import Policy
from kcache.tiers.lowrank import LowRankTail
from tests.oracle import topn_attention

CPU = torch.device("cpu")
FAST = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def problem(
    seed: int = 0,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 3,
    length: int = 70,
    dim: int = 16,
    value_dim: int = 16,
    spare: int = 0,
    dtype: torch.dtype = torch.float32,
    policy: Policy | None = None,
    masked: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    ties: bool = False,
    strided: bool = False,
    threshold: float | None = None,
) -> DecodeStep:
    """A random decode step; rows beyond ``length`` are NaN, as unwritten memory may be."""
    policy = policy or Policy(topn=9)
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    capacity = length + spare
    keys, values = randn(batch, kv_heads, capacity, dim), randn(batch, kv_heads, capacity, value_dim)
    if ties:
        keys = keys[:, :, :1].expand_as(keys).clone()
    if strided:
        keys = keys.transpose(0, 1).contiguous().transpose(0, 1)
        values = torch.cat([values, values], 1)[:, :kv_heads]
    keys[:, :, length:] = float("nan")
    values[:, :, length:] = float("nan")
    mask = None
    if masked:
        mask = torch.rand(batch, length, generator=draw) < 0.6
        mask[:, -1] = True
        mask[0, : length // 2] = False
    lowrank = None
    if policy.tail == "lowrank":
        directions = LowRankTail(policy.tail_rank, CPU)
        directions.append(values[:, :, :length], mask, directions.begins_at(length))
        lowrank = directions.state()
    return DecodeStep(
        query=randn(batch, kv_heads * group, dim),
        keys=keys,
        values=values,
        length=length,
        scaling=dim**-0.5,
        policy=policy,
        lowrank=lowrank,
        mask=mask,
        softcap=softcap,
        sinks=torch.randn(kv_heads * group, generator=draw) if sinks else None,
        threshold=None if threshold is None else torch.linspace(0.5, 1, batch) * threshold,
    )


def oracle(step: DecodeStep) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the mass by the brute-force definition."""
    batch, heads = step.keys.shape[:2]
    group = step.query.shape[1] // heads
    valid = torch.ones(batch, step.length, dtype=torch.bool) if step.mask is None else step.mask
    outs, masses = [], []
    for b in range(batch):
        for h in range(heads):
            own = slice(h * group, (h + 1) * group)
            sinks = None if step.sinks is None else step.sinks[own]
            rows = step.keys[b, h, : step.length], step.values[b, h, : step.length]
            basis = None if step.lowrank is None else (step.lowrank.base[b, h], step.lowrank.basis[b, h])
            least = None if step.threshold is None else float(step.threshold[b])
            out, _, mass = topn_attention(
                step.query[b, own], *rows, valid[b], step.policy, step.scaling, step.softcap, sinks, least, basis
            )
            outs.append(out)
            masses.append(mass)
    return torch.stack(outs).view(batch, heads * group, -1), torch.stack(masses).view(batch, heads, group)


def check(result: DecodeResult, step: DecodeStep, want: torch.Tensor, mass: torch.Tensor, tolerance: float) -> None:
    group = step.query.shape[1] // step.keys.shape[1]
    count = min(step.policy.topn, step.length)
    heads = (group,) if step.policy.select == "head" else ()
    if step.threshold is None:
        assert result.picks.shape == (*step.keys.shape[:2], *heads, count)
    else:
        count = result.picks.shape[-1]
        assert count <= max(1, min(MOST * step.policy.topn, step.length))
        assert result.picks.shape == (*step.keys.shape[:2], *heads, count)
    assert result.out.dtype == step.query.dtype
    assert result.mass.dtype == torch.float32
    assert ((result.picks >= (0 if step.threshold is None else -1)) & (result.picks < step.length)).all()
    for row in result.picks.flatten(0, -2).tolist():
        picked = [position for position in row if position >= 0]
        assert len(set(picked)) == len(picked)
    torch.testing.assert_close(result.out.double(), want.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(result.mass.double(), mass.double(), atol=tolerance, rtol=tolerance)
    assert result.weights.shape == result.picks.shape
    assert result.weights.dtype == torch.float32
    held = result.weights.masked_fill(result.picks < 0, 0).sum(-1).double()
    wanted = mass.double() if step.policy.select == "head" else mass.double().mean(2)
    torch.testing.assert_close(held, wanted, atol=tolerance, rtol=tolerance)


policies = st.builds(
    Policy,
    topn=st.sampled_from([1, 5, 16, 1000]),
    select=st.sampled_from(["group", "head"]),
    tail=st.sampled_from(["lowrank", "renormalise", "none"]),
    tail_rank=st.sampled_from([None, 1, 3, 1000]),
)
problems = st.builds(
    problem,
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    length=st.sampled_from([1, 2, 15, 16, 17, 63, 130]),
    dim=st.sampled_from([8, 20]),
    value_dim=st.sampled_from([8, 12]),
    spare=st.sampled_from([0, 1, 30, 500]),
    policy=policies,
    masked=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    strided=st.booleans(),
    threshold=st.sampled_from([None, None, 1e-6, 0.01, 0.05, 0.9]),
)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backend_equals_the_oracle(backend: str) -> None:
    made = choose_backend(backend, CPU)

    @FAST
    @given(problems)
    def run(step: DecodeStep) -> None:
        check(made.decode(step), step, *oracle(step), 1e-4)

    run()


def test_cpu_equals_the_reference_bitwise_picks() -> None:
    """One backend object for all shapes: its scratch memory is shared by whatever comes."""
    cpu, reference = CpuBackend(), ReferenceBackend()

    @FAST
    @given(problems)
    def run(step: DecodeStep) -> None:
        want, got = reference.decode(step), cpu.decode(step)
        mine, other = got.picks.sort(-1), want.picks.sort(-1)
        assert torch.equal(other.values, mine.values)
        weights = got.weights.gather(-1, mine.indices), want.weights.gather(-1, other.indices)
        torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)
        check(got, step, want.out, want.mass, 1e-5)

    run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("policy", [Policy(topn=9), Policy.paper(9), Policy(topn=9, tail="renormalise")])
def test_half_precision_is_near_the_reference(dtype: torch.dtype, masked: bool, policy: Policy) -> None:
    """Near ties may be picked otherwise, so the outputs are compared on average."""
    errors = []
    for seed in range(10):
        step = problem(seed, dtype=dtype, masked=masked, policy=policy, spare=seed * 10)
        want = ReferenceBackend().decode(step)
        got = CpuBackend().decode(step)
        assert got.out.dtype == dtype
        errors.append(float((got.out.float() - want.out.float()).abs().mean() / want.out.float().abs().mean()))
        torch.testing.assert_close(got.mass.mean(2), want.mass.mean(2), atol=0.03, rtol=0)
    assert sorted(errors)[5] < 0.01


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("select", ["group", "head"])
def test_ties_are_broken_somehow_but_soundly(backend: str, masked: bool, select: str) -> None:
    """All rows score alike: any choice is right, and its mass and weights belong to it."""
    step = problem(ties=True, masked=masked, policy=Policy(topn=9, select=select, tail="none"))
    result = choose_backend(backend, CPU).decode(step)
    valid = torch.ones(2, step.length, dtype=torch.bool) if step.mask is None else step.mask
    per_row = 1 / valid.sum(-1).float()
    picks = result.picks if select == "head" else result.picks.unsqueeze(2).expand(-1, -1, 3, -1)
    real = valid[:, None, None].expand(*picks.shape[:3], -1).gather(3, picks)
    torch.testing.assert_close(result.mass, real.sum(-1) * per_row[:, None, None])
    rows = step.values[:, :, None, : step.length].expand(-1, -1, 3, -1, -1)
    rows = rows.gather(3, picks[..., None].expand(*picks.shape, rows.shape[-1]))
    want = (rows * (real * per_row[:, None, None, None])[..., None]).sum(3).flatten(1, 2)
    torch.testing.assert_close(result.out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("select", ["group", "head"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", ["distinct", "ties", "mostly zero", "all alike"])
@pytest.mark.parametrize(("count", "length"), [(1, 64), (8, 1024), (8, 1000), (8, 513), (64, 4095), (8, 500)])
def test_selecting_in_two_stages_finds_the_largest(count: int, length: int, kind: str, group: int, select: Any) -> None:
    width = -(-length // 64) * 64
    step = replace(problem(batch=2, group=group, length=length), policy=Policy(topn=count, select=select))
    draw = torch.Generator().manual_seed(length)
    probs = torch.rand(2, 2, group, width, generator=draw)
    if kind == "ties":
        probs = (probs * 5).floor()
    elif kind == "mostly zero":  # fewer rows with any probability than are asked for
        probs = probs * (torch.arange(width) % (length // 3 + 1) == 0)
    elif kind == "all alike":
        probs = torch.full_like(probs, 0.25)
    probs[..., length:] = 0
    before = probs.clone()
    picks = CpuBackend().select(probs, step)
    want = ReferenceBackend().select(probs, step)
    weight = probs.amax(2) if select == "group" else probs
    assert torch.equal(probs, before)
    assert picks.shape == want.shape
    assert int(picks.max()) < length
    assert all(len(set(row.tolist())) == count for row in picks.view(-1, count))
    torch.testing.assert_close(
        weight.gather(-1, picks).sort(-1).values, weight.gather(-1, want).sort(-1).values, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tail", ["lowrank", "renormalise", "none"])
def test_a_sequence_with_nothing_to_attend_gives_zeros(backend: str, tail: str) -> None:
    step = problem(masked=True, policy=Policy(topn=5, tail=tail))
    mask = step.mask.clone()
    mask[0] = False
    result = choose_backend(backend, CPU).decode(replace(step, mask=mask))
    assert result.out.isfinite().all()
    assert (result.out[0] == 0).all()
    assert (result.mass[0] == 0).all()
    assert result.out[1].abs().sum() > 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_inputs_are_left_as_they_were_and_results_stay(backend: str) -> None:
    """Scratch memory is reused: what an earlier step returned must not change under its owner."""
    made = choose_backend(backend, CPU)
    for policy in (Policy(topn=4), Policy.paper(4)):
        step = problem(policy=policy, masked=True)
        before = {
            name: getattr(step, name).clone()
            for name in ("query", "keys", "values", "mask")
            if getattr(step, name) is not None
        }
        first = made.decode(step)
        kept = first.out.clone(), first.picks.clone(), first.mass.clone()
        for seed in range(3):
            made.decode(problem(seed + 1, policy=policy, length=90))
        for name, value in before.items():
            assert torch.equal(getattr(step, name).nan_to_num(7), value.nan_to_num(7)), name
        assert all(torch.equal(a, b) for a, b in zip(kept, (first.out, first.picks, first.mass), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spare", [0, 5, 300])
@pytest.mark.parametrize(
    "extra", [{}, {"masked": True}, {"softcap": 2.0, "sinks": True}, {"group": 1}, {"kv_heads": 1}]
)
def test_dense_step_is_exact_attention(
    backend: str, dtype: torch.dtype, spare: int, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident layers and short contexts; rows not yet filled are zeros in device buffers."""
    monkeypatch.setattr(cpu_backend, "_LONG", 64)
    made = choose_backend(backend, CPU)
    for length in (1, 63, 70, 300, 90):
        step = problem(length, length=length, spare=spare, dtype=dtype, **extra)
        step = replace(step, keys=step.keys.nan_to_num(0), values=step.values.nan_to_num(0))
        keys, values = step.keys[:, :, :length], step.values[:, :, :length]
        mask = None if step.mask is None else step.mask[:, None, None]
        want = attend(
            step.query[:, :, None].float(), keys.float(), values.float(), mask, step.scaling, step.softcap, step.sinks
        )
        got = made.dense(step)
        assert got.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(got.float(), want[:, :, 0], atol=tolerance, rtol=tolerance)


def test_choosing() -> None:
    assert choose_backend("auto", CPU).name == "cpu"
    assert choose_backend("reference", CPU).name == "reference"
    assert choose_backend("reference", torch.device("meta")).name == "reference"
    with pytest.raises(PolicyError, match="backend='auto'"):
        choose_backend("cpu", torch.device("cuda", 0))
