"""``kcache doctor``: measure the machine, and say what it lacks for the fast path."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...", show_default="auto")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure this machine, and say what is missing for the fast path.

    Bandwidth of device memory and of RAM, of the link by size of the copy, of single rows gathered from the host tier;
    NUMA nodes, limits of pinned memory, versions. Takes about ten seconds. Without a CUDA device it is a host-only
    report: only RAM is measured.

    Examples
    --------
      kcache doctor
      kcache doctor --json > machine.json
    """
    from kcache_cli.console import working

    with working("measuring"):
        import torch

        from kcache.machine.host import pci_slot, read_host
        from kcache.speed.findings import findings
        from kcache_cli.measured import measure

        machine = measure(device, quick=False)
        host = read_host()
        slot = None if machine.host_only else pci_slot(torch.device(machine.device))
        found = findings(machine, host, slot)
    from kcache_cli.doctor_view import show, to_dict
    from kcache_cli.text import json_line

    if as_json:
        print(json_line(to_dict(machine, host, slot, found)))
        return
    show(machine, host, slot, found)
