"""The low-rank tail: its directions are the leading ones, its coefficients the projections, however rows arrived."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.tiers.lowrank import LowRankTail

CPU = torch.device("cpu")


def feed(tail: LowRankTail, rows: torch.Tensor, valid: torch.Tensor | None, end: int) -> None:
    """Give the tail what it asks for to come to ``end`` rows."""
    start = tail.begins_at(end)
    tail.append(rows[:, :, start:end], None if valid is None else valid[:, start:end], start)


def projected(tail: LowRankTail, rows: torch.Tensor) -> torch.Tensor:
    """What the tail's own base and basis make of rows."""
    state = tail.state()
    base, basis = state.base.unsqueeze(2).to(rows.dtype), state.basis.to(rows.dtype)
    return base + rows @ basis.transpose(2, 3) @ basis


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_directions_are_the_leading_eigenvectors(rank: int, padded: bool) -> None:
    draw = torch.Generator().manual_seed(rank)
    rows = torch.randn(2, 3, 400, 24, generator=draw) @ torch.randn(2, 3, 24, 24, generator=draw) + 2
    valid = torch.rand(2, 400, generator=draw) < 0.7 if padded else None
    given_rows = rows.clone()
    if valid is not None:  # padding rows may hold anything
        given_rows[~valid[:, None].expand(-1, 3, -1)] = float("nan")
    tail = LowRankTail(rank, CPU)
    feed(tail, given_rows, valid, 400)
    got = tail.state().rows(400)
    for b in range(2):
        kept = slice(None) if valid is None else valid[b]
        for h in range(3):
            real = rows[b, h, kept].double()
            centred = real - real.mean(0)
            lost = torch.linalg.svdvals(centred)[rank:].square().sum()
            error = (got[b, h, kept].double() - real).square().sum()
            assert lost <= error * (1 + 1e-6)
            assert error <= lost * 1.01, "another subspace would lose less"


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=8),
    masked=st.booleans(),
    keep=st.floats(0, 1),
    known=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_way_of_arriving_and_cropping(sizes: list[int], masked: bool, keep: float, known: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    length = sum(sizes)
    rows = torch.randn(2, 3, length + 30, 8, generator=draw)
    valid = torch.rand(2, length + 30, generator=draw) < 0.6 if masked else None
    real = torch.ones(2, length + 30, dtype=torch.bool) if valid is None else valid
    tail = LowRankTail(2, CPU, (lambda: length + 30) if known else None)

    def check(end: int) -> None:
        want = projected(tail, rows[:, :, :end])[real[:, None, :end].expand(-1, 3, -1)]
        got = tail.state().rows(end)[real[:, None, :end].expand(-1, 3, -1)]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert tail.length == end
        assert tail.fitted <= end

    at = 0
    for size in sizes:
        at += size
        feed(tail, rows, valid, at)
        check(at)
    kept = int(keep * length)
    tail.crop(kept)
    check(kept)
    index = torch.tensor([1, 0, 1])
    tail.select(index)
    rows, real = rows[index], real[index]
    valid = None if valid is None else valid[index]
    feed(tail, rows, valid, kept + 1)
    feed(tail, rows, valid, kept + 30)
    check(kept + 30)


def test_directions_stay_once_fitted_on_many_rows() -> None:
    rows = torch.randn(1, 1, 9000, 16)
    tail = LowRankTail(None, CPU)
    feed(tail, rows, None, 3000)
    basis = tail.state().basis.clone()
    feed(tail, rows, None, 9000)
    assert tail.fitted == 3000
    assert torch.equal(tail.state().basis, basis)
    assert basis.shape == (1, 1, 1, 16), "a sixteenth of the head"


@pytest.mark.parametrize("rows", [torch.zeros(1, 2, 40, 16), torch.full((1, 2, 40, 16), 7.0), torch.ones(1, 2, 1, 16)])
def test_rows_that_are_all_alike(rows: torch.Tensor) -> None:
    tail = LowRankTail(3, CPU)
    feed(tail, rows, None, rows.shape[2])
    torch.testing.assert_close(tail.state().rows(rows.shape[2]), rows)


def test_bytes_are_those_of_the_tensors() -> None:
    tail = LowRankTail(2, CPU)
    assert tail.nbytes == 0
    feed(tail, torch.randn(1, 2, 33, 8).bfloat16(), None, 33)
    assert tail.nbytes == 64 * 2 * 2 * 2 + 2 * 8 * 4 + 2 * 2 * 8 * 4


def test_padding_before_the_first_real_row_is_no_reason_to_stop_fitting() -> None:
    """A sequence whose first chunk is all padding is fitted when its rows come, as it would be alone."""
    rows = torch.randn(2, 1, 7000, 16) @ torch.randn(16, 16)
    valid = torch.ones(2, 7000, dtype=torch.bool)
    valid[0, :4200] = False
    tail, alone = LowRankTail(3, CPU), LowRankTail(3, CPU)
    for end in (4096, 5500, 7000):
        feed(tail, rows, valid, end)
    feed(alone, rows[:1, :, 4200:], None, 2800)
    real = rows[0, :, 4200:]
    lost = [
        (approximated - real).square().sum()
        for approximated in (tail.state().rows(7000)[0, :, 4200:], alone.state().rows(2800)[0])
    ]
    assert lost[0] < 1.1 * lost[1]


def test_cropping_what_it_has_not_seen() -> None:
    tail = LowRankTail(2, CPU)
    feed(tail, torch.randn(1, 1, 40, 8), None, 40)
    tail.crop(140)
    assert tail.length == 40


def test_rows_that_are_not_finite_do_not_stop_a_forward() -> None:
    rows = torch.randn(1, 1, 40, 8)
    rows[0, 0, 7, 3] = float("inf")
    rows[0, 0, 9, 3] = float("nan")
    tail = LowRankTail(2, CPU)
    feed(tail, rows, None, 40)
    assert tail.state().basis.isfinite().all()


def test_autocast_does_not_reach_the_fit() -> None:
    tail = LowRankTail(2, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        feed(tail, torch.randn(1, 1, 40, 8).bfloat16(), None, 40)
    assert tail.state().basis.dtype == tail.state().base.dtype == torch.float32
