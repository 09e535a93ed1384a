"""The kernel that measures the gather copies the rows it is asked for."""

from __future__ import annotations

import torch

from kcache.speed.rowcopy import gather_rows


def test_triton_rowcopy(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    host = torch.randn(300, 128, generator=generator).bfloat16()
    host = host.pin_memory() if device.type == "cuda" else host
    for count in (1, 16, 37):
        index = torch.randint(0, 300, (count,), generator=generator)
        out = torch.full((64, 128), float("nan"), dtype=torch.bfloat16, device=device)
        copied = gather_rows(host, index.to(device), out)
        assert torch.equal(copied.cpu(), host[index])
        assert out[count:].isnan().all()
