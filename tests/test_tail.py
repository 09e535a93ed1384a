"""Block means of V: the same whatever way the rows arrived, over valid rows only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.tail import BlockTail

CPU = torch.device("cpu")


def block_counts(valid: torch.Tensor, block: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(valid, (0, -valid.shape[1] % block))
    return padded.view(valid.shape[0], -1, block).sum(-1, dtype=torch.int32)


def straight(rows: torch.Tensor, valid: torch.Tensor | None, block: int) -> torch.Tensor:
    """Means written down block by block; 0 where a block has no valid row."""
    means = []
    for start in range(0, rows.shape[2], block):
        piece = rows[:, :, start : start + block].double()
        weight = torch.ones(rows.shape[0], piece.shape[2], dtype=torch.double)
        if valid is not None:
            weight = valid[:, start : start + block].double()
        total = torch.einsum("bhtd,bt->bhd", piece.nan_to_num(0), weight)
        means.append(total / weight.sum(1).clamp(min=1)[:, None, None])
    return torch.stack(means, 2)


def feed(tail: BlockTail, rows: torch.Tensor, valid: torch.Tensor | None, start: int, end: int) -> None:
    counts = None if valid is None else block_counts(valid[:, :end], tail.block)
    tail.append(rows[:, :, start:end], None if valid is None else valid[:, start:end], counts)


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(
    block=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=8),
    masked=st.booleans(),
    crop=st.floats(0, 1),
    seed=st.integers(0, 1000),
    known=st.booleans(),
)
def test_any_way_of_arriving_and_cropping(
    block: int, sizes: list[int], masked: bool, crop: float, seed: int, known: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    length = sum(sizes)
    rows = torch.randn(2, 3, length + 30, 4, generator=draw)
    valid = torch.rand(2, length + 30, generator=draw) < 0.6 if masked else None
    if valid is not None:  # padding rows may hold anything
        rows[~valid[:, None].expand(-1, 3, -1)] = float("nan")
    tail = BlockTail(block, CPU, (lambda: length + 30) if known else None)
    at = 0
    for size in sizes:
        feed(tail, rows, valid, at, at + size)
        at += size
        want = straight(rows[:, :, :at], None if valid is None else valid[:, :at], block)
        torch.testing.assert_close(tail.means().double(), want, atol=1e-5, rtol=1e-5)
    keep = int(crop * length)
    first = keep - keep % block
    tail.crop(keep, rows[:, :, first:keep], None if valid is None else valid[:, first:keep])
    assert tail.length == keep
    want = straight(rows[:, :, :keep], None if valid is None else valid[:, :keep], block) if keep else rows[:, :, :0]
    torch.testing.assert_close(tail.means().double(), want.double(), atol=1e-5, rtol=1e-5)
    index = torch.tensor([1, 0, 1])
    tail.select(index)
    rows, valid = rows[index], None if valid is None else valid[index]
    feed(tail, rows, valid, keep, keep + 1)
    feed(tail, rows, valid, keep + 1, keep + 30)
    want = straight(rows[:, :, : keep + 30], None if valid is None else valid[:, : keep + 30], block)
    torch.testing.assert_close(tail.means().double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32_however_slowly_rows_arrive(dtype: torch.dtype) -> None:
    """A block fed row by row is rounded once, not once a row."""
    rows = (torch.randn(1, 2, 128, 8) + 50).to(dtype)
    slow, fast = BlockTail(64, CPU), BlockTail(64, CPU)
    for at in range(128):
        slow.append(rows[:, :, at : at + 1], None, None)
    fast.append(rows, None, None)
    want = straight(rows, None, 64).to(dtype)
    assert fast.means().dtype == slow.means().dtype == dtype
    assert torch.equal(slow.means(), fast.means())
    torch.testing.assert_close(slow.means(), want, rtol=float(torch.finfo(dtype).eps), atol=0)


def test_bytes_are_those_of_the_tensors() -> None:
    tail = BlockTail(16, CPU)
    assert tail.nbytes == 0
    tail.append(torch.randn(1, 2, 33, 8), None, None)
    assert tail.nbytes == 64 * 2 * 8 * 4 + 2 * 8 * 4
    tail.append(torch.randn(1, 2, 15, 8), None, None)
    assert tail.nbytes == 64 * 2 * 8 * 4


def test_rows_given_are_not_written_to() -> None:
    tail = BlockTail(4, CPU)
    tail.append(torch.ones(1, 1, 1, 2), None, None)
    row = torch.full((1, 1, 1, 2), 3.0)
    tail.append(row, None, None)
    assert (row == 3).all()
    assert (tail.means() == 2).all()
