"""Norms, rotary embeddings and gated activations in one launch, against the torch operators they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kcache.backends.triton.pointwise import Scaling, gated, rms_norm, rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to a rounding; in 16 bits to the bit nearly wherever more than noise is left."""
    eps, noise = torch.finfo(want.dtype).eps, 4e-6
    torch.testing.assert_close(got, want, rtol=8 * eps if want.dtype == torch.float32 else eps, atol=noise)
    if want.dtype != torch.float32:
        assert float(((got - want).abs() > noise).float().mean()) < 0.01


def normed(rows: torch.Tensor, weight: torch.Tensor, eps: float, scaling: Scaling) -> torch.Tensor:
    wide = rows.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if scaling == "rounded":
        return weight * normal.to(rows.dtype)
    return (normal * (weight.float() + (1.0 if scaling == "one plus" else 0.0))).to(rows.dtype)


@pytest.mark.parametrize("scaling", ["rounded", "plain", "one plus"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "eps"), [(96, 1e-6), (1024, 1e-2)])
def test_triton_norms(device: torch.device, scaling: Scaling, dtype: torch.dtype, width: int, eps: float) -> None:
    rows, weight = random(device, 3, 1, width, dtype=dtype), random(device, width, dtype=dtype, seed=1)
    rows[1] *= 1e-2
    check(rms_norm(rows, weight, eps, scaling), normed(rows, weight, eps, scaling))


def test_triton_norms_of_heads_with_any_strides(device: torch.device) -> None:
    weight = random(device, 16, seed=1)
    together = random(device, 3, 2, 6 * 16)
    views = [
        together.view(3, 2, 6, 16).transpose(1, 2),  # heads before positions
        together[..., :64].view(3, 2, 4, 16),  # queries cut from one product with keys
        together.view(3, 2, 16, 6).transpose(2, 3),  # no row is contiguous
        together[:0, ..., :64].view(0, 2, 4, 16),
        together[:, :1, 32:].view(3, 1, 4, 16).transpose(1, 2),  # heads of one token before its position
        together[0, 0, 16:32],
    ]
    for rows in views:
        got = rms_norm(rows, weight, 1e-6, "rounded")
        assert got.is_contiguous()
        check(got, normed(rows, weight, 1e-6, "rounded"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 48])
def test_triton_rotations(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Queries lie as a product leaves them, keys in the middle of one; angles differ between sequences."""
    query = random(device, 2, 1, 4 * dim, dtype=dtype).view(2, 1, 4, dim).transpose(1, 2)
    key = random(device, 2, 1, 4 * dim, dtype=dtype, seed=1)[..., dim : 3 * dim].view(2, 1, 2, dim).transpose(1, 2)
    cos, sin = random(device, 2, 2, 1, dim, dtype=dtype, seed=2)
    want = apply_rotary_pos_emb(query, key, cos, sin)
    got = rotate(query[:, :, 0], key[:, :, 0], cos[:, 0], sin[:, 0], rounded=True)
    for mine, theirs in zip(got, want, strict=True):
        assert mine is not None
        check(mine, theirs[:, :, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_rotations_in_full_precision_with_one_set_of_angles(device: torch.device, dtype: torch.dtype) -> None:
    query = random(device, 3, 4, 32, dtype=dtype)
    half = random(device, 2, 1, 1, 16, seed=1)
    cos, sin = torch.cat([half, half], -1)
    want, _ = apply_rotary_pos_emb(query[:, :, None], query[:, :, None], cos, sin)
    for columns in (32, 16):
        got, none = rotate(query, None, cos[:, 0, :columns], sin[:, 0, :columns], rounded=False)
        assert none is None
        check(got, want[:, :, 0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_triton_gated_activations(device: torch.device, dtype: torch.dtype, activation: Any) -> None:
    """Apart, and as halves of one product; a width that no block divides."""
    both = random(device, 2, 1, 2 * 1100, dtype=dtype) * 4
    both[0, 0, :4] = torch.tensor([-120.0, -20.0, 120.0, 0.0])
    gate, up = both.chunk(2, -1)
    active = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    check(gated(gate, up, activation), active * up)
    check(gated(gate.contiguous(), up.contiguous(), activation), active * up)
