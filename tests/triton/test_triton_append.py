"""Appending by kernel: rows land where they should, and the open block's mean follows."""

from __future__ import annotations

import pytest
import torch

from kcache.backends.triton import append


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("block", "dim", "dim_v"), [(4, 64, 80), (6, 32, 32)])
def test_triton_append_writes_rows_and_means(
    padded: bool, block: int, dim: int, dim_v: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, heads, steps = 2, 3, 15
    new_keys = torch.randn(steps, batch, heads, dim, generator=generator).to(device)
    new_values = torch.randn(steps, batch, heads, dim_v, generator=generator).to(device)
    valid = torch.rand(batch, 16, generator=generator) > (0.4 if padded else -1.0)
    keys = torch.full((batch, heads, 16, dim), float("nan"), device=device)
    values = torch.full((batch, heads, 16, dim_v), float("nan"))
    values = values.pin_memory() if device.type == "cuda" else values
    means = torch.full((batch, heads, -(-16 // block), dim_v), float("nan"), device=device)
    open_sum = torch.full((batch, heads, dim_v), float("nan"), device=device)
    length = torch.zeros(1, dtype=torch.int32, device=device)
    for step in range(steps):
        counted = step % 2  # both conventions: the length before, or with, the new token
        length.fill_(step + counted)
        append(
            new_keys[step], new_values[step], keys, values, length, offset=-counted, means=means, open_sum=open_sum,
            tail_block=block, mask=valid.to(device) if padded else None,
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    torch.testing.assert_close(keys[:, :, :steps], new_keys.permute(1, 2, 0, 3))
    assert keys[:, :, steps:].isnan().all()
    rows = new_values.permute(1, 2, 0, 3).cpu()
    torch.testing.assert_close(values[:, :, :steps], rows)
    assert values[:, :, steps:].isnan().all()
    for first in range(0, steps, block):
        span = slice(first, min(first + block, steps))
        bits = valid[:, None, span, None]
        mean = (rows[:, :, span] * bits).sum(2) / bits.sum(2).clamp(min=1)
        torch.testing.assert_close(means[:, :, first // block].cpu(), mean)


def test_triton_append_without_tail_and_in_bf16(device: torch.device) -> None:
    new = torch.randn(1, 2, 64).bfloat16().to(device)
    keys = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16, device=device)
    values = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16, device=device)
    append(new, new * 2, keys, values, torch.tensor([5], dtype=torch.int32, device=device))
    torch.testing.assert_close(keys[:, :, 5], new)
    torch.testing.assert_close(values[:, :, 5], new * 2)
    assert values.count_nonzero() == new.count_nonzero()
