"""Appending by kernel: rows land where they should, and so do their coefficients."""

from __future__ import annotations

import pytest
import torch

from kcache.backends.rounding import quantise, remainder
from kcache.backends.triton import append
from kcache.tiers.bytes import ByteRows
from kcache.tiers.lowrank import LowRankTail


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "dim_v", "rank"), [(64, 80, 5), (32, 32, 2), (32, 80, 35)])
def test_triton_append_writes_rows_and_their_tail(
    dim: int, dim_v: int, rank: int, dtype: torch.dtype, padded: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, heads, first, steps = 2, 3, 20, 7

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    new_keys, new_values = normal(steps, batch, heads, dim), normal(steps, batch, heads, dim_v)
    valid = torch.rand(batch, first + steps, generator=generator) > (0.4 if padded else -1.0)
    keys = torch.full((batch, heads, 32, dim), float("nan"), dtype=dtype, device=device)
    values = torch.full((batch, heads, 32, dim_v), float("nan"), dtype=dtype)
    values = values.pin_memory() if device.type == "cuda" else values
    tail, slow = LowRankTail(rank, device), LowRankTail(rank, device)
    prompt = normal(batch, heads, first, dim_v).to(device)
    for directions in (tail, slow):
        directions.append(prompt, None, 0)
    state = tail.state()
    length = torch.zeros(1, dtype=torch.int32, device=device)
    for step in range(steps):
        counted = step % 2  # both conventions: the length before, or with, the new token
        length.fill_(first + step + counted)
        append(
            new_keys[step].to(device), new_values[step].to(device), keys, values, length, offset=-counted,
            lowrank=state, mask=valid.to(device) if padded else None,
        )  # fmt: skip
        bits = valid[:, first + step : first + step + 1].to(device)
        slow.append(new_values[step].to(device).unsqueeze(2), bits if padded else None, first + step)
    if device.type == "cuda":
        torch.cuda.synchronize()
    last = first + steps
    torch.testing.assert_close(keys[:, :, first:last].cpu(), new_keys.permute(1, 2, 0, 3))
    torch.testing.assert_close(values[:, :, first:last], new_values.permute(1, 2, 0, 3))
    for rows in (keys, values):
        assert rows[:, :, :first].isnan().all()
        assert rows[:, :, last:].isnan().all()
    loose = 1e-5 if dtype == torch.float32 else 0.03
    got, want = state.coefficients[..., :last], slow.state().coefficients[..., :last]
    torch.testing.assert_close(got, want, rtol=loose, atol=loose)


def test_triton_append_in_8_bits(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    new_keys, new_values = torch.randn(2, 3, 64, generator=generator), torch.randn(2, 3, 48, generator=generator)
    new_values[1, 2] = 0
    kept = ByteRows(device, device, planes=2, centred=True), ByteRows(torch.device("cpu"), device)
    centre = torch.randn(2, 3, 64, generator=generator)
    kept[0].put(centre.unsqueeze(2).expand(-1, -1, 6, -1).to(device), 0)
    kept[1].put(torch.zeros(2, 3, 6, 48, device=device), 0)
    keys, values = (rows.data for rows in kept)
    values = values.pin_memory() if device.type == "cuda" else values
    append(
        new_keys.to(device), new_values.to(device), keys, values,
        torch.tensor([5], dtype=torch.int32, device=device), narrow=kept[0].narrow, value_scales=kept[1].scales,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    narrow = kept[0].narrow
    assert narrow is not None and narrow.lower is not None
    centre = narrow.centre.cpu()  # as the mean of six alike came out
    for new, whole, rows, middle in ((new_keys, keys, kept[0], centre), (new_values, values, kept[1], 0.0)):
        want, scales = quantise(new - middle)
        assert torch.equal(whole[:, :, 5].cpu(), want)
        torch.testing.assert_close(rows.scales[:, :, 5].cpu(), scales.squeeze(2), rtol=1e-6, atol=0)
        assert (rows.scales[:, :, :5] < 1e-6).all(), "the rows before are as they were"
    want = remainder(new_keys - centre, *quantise(new_keys - centre))
    assert (narrow.lower[:, :, 5].cpu() - want).abs().max() <= 1  # the scale may differ in its last bit


def test_triton_append_without_tail_and_in_bf16(device: torch.device) -> None:
    new = torch.randn(1, 2, 64).bfloat16().to(device)
    keys = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16, device=device)
    values = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16, device=device)
    append(new, new * 2, keys, values, torch.tensor([5], dtype=torch.int32, device=device))
    torch.testing.assert_close(keys[:, :, 5], new)
    torch.testing.assert_close(values[:, :, 5], new * 2)
    assert values.count_nonzero() == new.count_nonzero()
