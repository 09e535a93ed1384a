"""The kernel that finds the tail's directions against an exact decomposition, and against the iteration in torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kcache.backends.triton.directions import leading_directions, takes
from kcache.tiers.lowrank import _leading

DECAYS = {
    "flat": lambda i: torch.ones_like(i),
    "root": lambda i: (1 + i) ** -0.5,
    "inverse": lambda i: (1 + i) ** -1.0,
    "square": lambda i: (1 + i) ** -2.0,
    "halving": lambda i: 0.5**i,
    "steps": lambda i: torch.where(i < 3, 100.0, 0.1),
    "rank 2": lambda i: torch.where(i < 2, 1.0, 0.0),
    "zero": lambda i: torch.zeros_like(i),
}


def covariance(decay: str, dim: int, heads: int, device: torch.device) -> torch.Tensor:
    draw = torch.Generator().manual_seed(dim)
    rows = torch.randn(2, heads, 6 * dim, dim, generator=draw) * DECAYS[decay](torch.arange(dim, dtype=torch.float32))
    rows = rows @ torch.linalg.qr(torch.randn(2, heads, dim, dim, generator=draw)).Q
    return (rows.transpose(2, 3) @ rows).to(device)


def captured(of: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Variance that lies in the span of a basis's rows."""
    of, basis = of.double(), basis.double()
    return (basis @ of @ basis.transpose(2, 3)).diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("dim", "rank"), [(128, 8), (64, 4), (24, 8), (8, 1), (80, 5)])
def test_directions_capture_what_the_leading_ones_do(decay: str, dim: int, rank: int, device: torch.device) -> None:
    of = covariance(decay, dim, 1, device)
    basis = leading_directions(of, rank, min(dim, rank + 4), 6)
    best = torch.linalg.eigvalsh(of.double())[..., -rank:].sum(-1)
    got, torchs = captured(of, basis), captured(of, _leading(of, rank))
    assert bool((got >= torchs - 1e-5 * best).all()), "worse than the iteration in torch"
    if decay != "flat":
        assert bool((best - got <= 1e-3 * best).all())
    product = basis @ basis.transpose(2, 3)
    assert float((product @ product - product).abs().max()) < 1e-4, "rows are orthonormal, or zero"
    assert torch.equal(basis, leading_directions(of, rank, min(dim, rank + 4), 6))


def test_sizes_it_takes() -> None:
    assert takes(128, 12)
    assert not takes(256, 20)
    assert not takes(128, 68)


def test_it_compiles_for_sm90() -> None:
    """In registers, but for what little the largest size spills."""
    code = (
        "import torch; from tests.triton.compile_for import compile_only, resources\n"
        "from kcache.backends.triton.directions import leading_directions\n"
        "with compile_only() as compiled: leading_directions(torch.empty(1, 8, 128, 128), 8, 12, 6)\n"
        "found = resources(compiled[0][1]); assert found['stack'] <= 512 and found['local'] == 0, found\n"
        "assert not any('TF32' in op for op in found['ops']), found"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
