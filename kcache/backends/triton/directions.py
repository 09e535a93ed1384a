"""The leading eigenvectors of many small covariances in one launch of a Triton kernel, and no wait of the host.

The same subspace iteration as in :mod:`kcache.tiers.lowrank`, one program per KV head, all of it in registers. torch's
``qr`` and ``eigh`` launch hundreds of kernels for it, head by head, and the host waits for the latter's verdict.
Directions in which rows hardly vary beside the others (a hundred-thousandth of the variance) may be left out: zeros.

Kept apart because importing it imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MOST_CARRIED = 32
_MOST_DIM = 128
_SWEEPS = 6


@triton.jit
def _orthonormal(span, columns, CARRIED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of ``span`` one after another made orthonormal; what is left of one that depends on others is zero."""
    before = tl.sum(span * span, 0)
    for k in range(CARRIED):
        column = tl.sum(tl.where(columns[None, :] == k, span, 0.0), 1)
        square = tl.sum(column * column, 0)
        least = 1e-10 * tl.sum(tl.where(columns == k, before, 0.0), 0)
        alive = (square > least) & (square > 1e-30)
        column = tl.where(alive, column / tl.sqrt(tl.where(alive, square, 1.0)), 0.0)
        along = tl.sum(span * column[:, None], 0)
        rest = tl.where(columns[None, :] > k, span - column[:, None] * along[None, :], span)
        span = tl.where(columns[None, :] == k, column[:, None], rest)
    return span


@triton.jit
def _times(cov, span, columns, CARRIED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Product of a symmetric matrix with the columns of ``span``: a loop, where ``tl.dot`` would spill registers."""
    product = tl.zeros_like(span)
    for k in range(CARRIED):
        column = tl.sum(tl.where(columns[None, :] == k, span, 0.0), 1)
        product = tl.where(columns[None, :] == k, tl.sum(cov * column[None, :], 1)[:, None], product)
    return product


@triton.jit
def _place(values, numbers):  # type: ignore[no-untyped-def]
    """The place of each value among all, the largest first."""
    own = tl.sum(tl.where(numbers[:, None] == numbers[None, :], values[None, :], 0.0), 1)
    ahead = (values[None, :] > own[:, None]) | (
        (values[None, :] == own[:, None]) & (numbers[None, :] < numbers[:, None])
    )
    return tl.sum(ahead.to(tl.int32), 1)


@triton.jit
def _jacobi(small, numbers, SIZE: tl.constexpr, SWEEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eigenvectors (columns) and eigenvalues of a symmetric ``[SIZE, SIZE]``: all pairs of a round robin at a time."""
    same = numbers[:, None] == numbers[None, :]
    vectors = tl.where(same, 1.0, 0.0)
    for turn in range(SWEEPS * (SIZE - 1)):
        step = turn % (SIZE - 1)
        partner = (step - numbers + 2 * (SIZE - 1)) % (SIZE - 1)
        partner = tl.where(partner == numbers, SIZE - 1, partner)
        partner = tl.where(numbers == SIZE - 1, (step * (SIZE // 2)) % (SIZE - 1), partner)
        paired = numbers[None, :] == partner[:, None]
        own = tl.sum(tl.where(same, small, 0.0), 1)
        across = tl.sum(tl.where(same, small, 0.0), 0)
        other = tl.sum(tl.where(paired, across[None, :], 0.0), 1)
        both = tl.sum(tl.where(paired, small, 0.0), 1)
        sign = tl.where(numbers < partner, 1.0, -1.0)
        apart = sign * (other - own)
        turned = both != 0.0
        tau = apart / tl.where(turned, 2.0 * both, 1.0)
        tau = tl.minimum(tl.maximum(tau, -1e15), 1e15)  # whose square is finite
        tangent = tl.where(tau >= 0.0, 1.0, -1.0) / (tl.abs(tau) + tl.sqrt(1.0 + tau * tau))
        tangent = tl.where(turned, tangent, 0.0)
        cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
        rotation = tl.where(same, cosine[:, None], tl.where(paired, (sign * tangent * cosine)[:, None], 0.0))
        small = tl.dot(tl.trans(rotation), tl.dot(small, rotation, input_precision="ieee"), input_precision="ieee")
        small = 0.5 * (small + tl.trans(small))
        vectors = tl.dot(vectors, rotation, input_precision="ieee")
    return vectors, tl.sum(tl.where(same, small, 0.0), 0)


@triton.jit
def directions_kernel(  # type: ignore[no-untyped-def]
    covariance, out, D: tl.constexpr, BLOCK: tl.constexpr, CARRIED: tl.constexpr, SIZE: tl.constexpr,
    RANK: tl.constexpr, ROUNDS: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """One program per covariance."""
    row = tl.program_id(0).to(tl.int64)
    dims, numbers = tl.arange(0, BLOCK), tl.arange(0, SIZE)
    inside = (dims < D)[:, None] & (dims < D)[None, :]
    cov = tl.load(covariance + row * D * D + dims[:, None] * D + dims[None, :], mask=inside, other=0.0)
    diagonal = tl.where(dims[:, None] == dims[None, :], cov, 0.0)
    total = tl.sum(tl.sum(diagonal, 0), 0)
    cov = cov / tl.where(total > 0.0, total, 1.0)
    place = _place(tl.sum(diagonal, 0), dims)
    span = tl.where((place[:, None] == numbers[None, :]) & (numbers < CARRIED)[None, :], 1.0, 0.0)
    for _ in range(ROUNDS):
        span = _orthonormal(_times(cov, span, numbers, CARRIED), numbers, CARRIED)
    span = _orthonormal(span, numbers, CARRIED)
    small = tl.dot(tl.trans(span), _times(cov, span, numbers, CARRIED), input_precision="ieee")
    vectors, found = _jacobi(small, numbers, SIZE, SWEEPS)
    chosen = tl.where(_place(found, numbers)[:, None] == numbers[None, :], 1.0, 0.0)
    basis = tl.dot(span, tl.dot(vectors, chosen, input_precision="ieee"), input_precision="ieee")
    place_out = out + row * RANK * D + numbers[None, :] * D + dims[:, None]
    tl.store(place_out, basis, mask=(dims < D)[:, None] & (numbers < RANK)[None, :])


def takes(dim: int, carried: int) -> bool:
    """Whether the kernel keeps so large a covariance, and so many directions, in registers."""
    return dim <= _MOST_DIM and carried <= _MOST_CARRIED


def leading_directions(covariance: torch.Tensor, rank: int, carried: int, rounds: int) -> torch.Tensor:
    """Orthonormal rows ``[..., rank, D]`` fp32 that span the leading eigenvectors of ``[..., D, D]`` fp32.

    ``carried`` directions are iterated for ``rounds`` rounds, at least ``rank``.
    """
    dim = covariance.shape[-1]
    covariance = covariance.contiguous()
    out = torch.empty(*covariance.shape[:-2], rank, dim, dtype=torch.float32, device=covariance.device)
    grid = (covariance.shape[:-2].numel(),)
    block = max(16, triton.next_power_of_2(dim))
    with torch.cuda.device(out.device) if out.device.type == "cuda" else torch.no_grad():
        directions_kernel[grid](
            covariance, out, D=dim, BLOCK=block, CARRIED=carried,
            SIZE=max(16, triton.next_power_of_2(carried)), RANK=rank, ROUNDS=rounds, SWEEPS=_SWEEPS,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return out
