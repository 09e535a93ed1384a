"""Kernels that turn rows into 8 bits and back against torch's operators."""

from __future__ import annotations

import pytest
import torch

from kcache.backends.rounding import LOWER_STEPS, centre_of, quantise, remainder
from kcache.backends.triton.narrow import narrow, widen
from kcache.tiers.bytes import ByteRows, dequantise


def drawn(dim: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(2, length, 3, dim) * torch.logspace(-3, 3, length).view(length, 1, 1)
    rows[0, 0, 1] = 0
    return rows.to(dtype).transpose(1, 2)  # as a model has them


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "length"), [(64, 70), (80, 1), (16, 300), (5, 33)])
def test_triton_rows_are_narrowed_and_widened_as_by_torch(
    dim: int, length: int, dtype: torch.dtype, planes: int, centred: bool, device: torch.device
) -> None:
    rows = drawn(dim, length, dtype).to(device)
    centre = centre_of(rows) if centred else None
    upper, scales, lower = narrow(rows, planes, centre)
    want, want_scales = quantise(rows, centre)
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)
    assert (upper.int() - want).abs().max() <= 1, "where two are as near"
    assert (upper == want).float().mean() > 0.999
    assert (lower is None) == (planes == 1)
    if lower is not None:
        near = dequantise(upper, scales, torch.empty(rows.shape, device=device), lower, centre) - rows.float()
        sizes = 0 if centre is None else centre.abs().unsqueeze(2) * 1e-6
        assert (near.abs() <= scales * (0.51 / LOWER_STEPS) + sizes).all()
        assert (lower == remainder(rows, upper, scales, centre)).float().mean() > 0.99
    room = torch.full((2, 3, length + 5, dim), float("nan"), dtype=dtype, device=device)
    widen(upper, scales, room[:, :, 3 : 3 + length], lower, centre)
    assert room[:, :, :3].isnan().all() and room[:, :, 3 + length :].isnan().all()
    steps = upper.float() if lower is None else upper + lower.float() / LOWER_STEPS
    rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    exact = steps * scales if centre is None else steps * scales + centre.unsqueeze(2)
    least = 1e-7 if centre is None else 1e-6 * centre.abs().max().item()
    torch.testing.assert_close(room[:, :, 3 : 3 + length].float(), exact, rtol=rounding, atol=least)


@pytest.mark.parametrize("planes", [1, 2])
def test_triton_rows_that_are_kept_go_by_the_kernels(
    planes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers that are larger than what is in them, grown, and widened from the middle."""
    monkeypatch.setattr("kcache.tiers.bytes.runs_kernels", lambda device: True)
    for name in ("quantise", "remainder"):
        monkeypatch.setattr(f"kcache.tiers.bytes.{name}", lambda *given: pytest.fail("torch was asked"))
    kept, rows = ByteRows(device, device, planes=planes, centred=True), drawn(32, 90, torch.bfloat16).to(device)
    kept.put(rows[:, :, :50], 0)
    kept.put(rows[:, :, 50:], 50)
    assert kept.scales is not None
    step = kept.scales[:, :, :90, None] / (1 if planes == 1 else LOWER_STEPS)
    bound = 0.51 * step + rows.float().abs() * 8e-3  # the interpreter cuts bf16 off
    assert ((kept.get(90).float() - rows.float()).abs() <= bound).all()
    late = rows[:, :, 80:]
    whole = kept.followed_by(late, 90)
    assert torch.equal(whole[:, :, 80:], late)
    assert torch.equal(whole[:, :, :80], kept.get(80))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_triton_a_row_of_no_numbers_has_a_scale_that_is_none(number: float, device: torch.device) -> None:
    rows = torch.randn(1, 2, 5, 16)
    rows[0, 1, 3, 7] = number
    _, scales, _ = narrow(rows.to(device), 2)
    assert scales.isnan().nonzero().tolist() == [[0, 1, 3, 0]]
