"""A kernel that copies scattered rows from pinned host memory to the device, to measure how fast that goes.

It reads the way the engine's gather does: every program issues the 16-byte loads of all its rows at once, past the
caches, straight from host memory. It is kept apart because importing it imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 16


@triton.jit
def gather_kernel(host, index, out, rows, D: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy rows ``index`` of ``host``, ``ROWS`` of them a program."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = at < rows
    position = tl.load(index + at, mask=inside, other=0)
    columns = tl.arange(0, D)
    data = tl.load(host + position[:, None] * D + columns[None, :], mask=inside[:, None], cache_modifier=".cg")
    tl.store(out + at[:, None] * D + columns[None, :], data, mask=inside[:, None])


def gather_rows(host: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy the rows ``index`` ``[n]`` int64 of ``host`` ``[rows, D]`` into the first rows of ``out`` ``[>= n, D]``.

    ``D`` is a power of two; ``index`` and ``out`` are on the device.
    """
    count = len(index)
    with torch.cuda.device(out.device) if out.device.type == "cuda" else torch.no_grad():
        gather_kernel[(triton.cdiv(count, _ROWS),)](
            host, index, out, count, D=host.shape[1], ROWS=_ROWS, num_warps=4, enable_fp_fusion=True
        )
    return out[:count]
