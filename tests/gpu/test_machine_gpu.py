"""Measuring a CUDA device."""

from __future__ import annotations

import pytest
import torch

from kcache.machine.host import pci_slot
from kcache.speed.bandwidth import LINK_SIZES
from kcache.speed.machine import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_measure_the_device() -> None:
    machine = measure("auto", quick=False)
    assert machine.device == "cuda:0"
    assert not machine.host_only
    assert machine.pinned
    assert [link.size for link in machine.links] == list(LINK_SIZES)
    assert machine.h2d_gb_s is not None
    assert 0 < machine.gather_gb_s < 2 * machine.h2d_gb_s
    assert machine.h2d_gb_s < machine.device_copy_gb_s
    assert machine.device_copy_gb_s > machine.ram_copy_gb_s
    pci_slot(torch.device(machine.device))
