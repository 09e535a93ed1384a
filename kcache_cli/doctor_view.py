"""What ``kcache doctor`` found, as tables and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kcache_cli.console import answers, plain_table, put
from kcache_cli.text import size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kcache.machine.host import Host, PciSlot
    from kcache.speed.findings import Finding
    from kcache.speed.machine import Machine

WITH_A_GPU = (
    "with a GPU: bandwidth of its memory, pinned copies over the link from 4 KiB to 64 MiB, and rows that its kernels "
    "gather from pinned memory"
)


def to_dict(machine: Machine, host: Host, slot: PciSlot | None, found: Sequence[Finding]) -> dict[str, Any]:
    """Everything as plain values; what was not measured is null."""
    measured = asdict(machine)
    if machine.host_only:
        measured |= {"device_copy_gb_s": None, "device_read_gb_s": None, "device_bytes": None}
    return {
        "host_only": machine.host_only,
        "machine": measured,
        "host": asdict(host),
        "pci": None if slot is None else asdict(slot),
        "findings": [asdict(finding) for finding in found],
    }


def show(machine: Machine, host: Host, slot: PciSlot | None, found: Sequence[Finding]) -> None:
    """Print the report."""
    console = answers()
    kind = "host-only: both tiers are RAM" if machine.host_only else machine.device
    console.print(f"{machine.name} · {kind}", style="bold")
    console.print()
    console.print(_speeds(machine))
    if machine.links:
        console.print()
        console.print(_links(machine))
    console.print()
    console.print(_gathers(machine))
    console.print("one by one, as a decode step fetches the V rows it has picked", style="dim")
    console.print()
    console.print(_system(machine, host, slot))
    console.print()
    _findings(console, machine, found)


def _speeds(machine: Machine) -> Table:
    table = _table("bandwidth", "GB/s")
    if not machine.host_only:
        table.add_row("device memory, copy (read + written)", _number(machine.device_copy_gb_s))
        table.add_row("device memory, read", _number(machine.device_read_gb_s))
    table.add_row("RAM, copy (read + written)", _number(machine.ram_copy_gb_s))
    table.add_row("RAM, read", _number(machine.ram_read_gb_s))
    if machine.h2d_gb_s is not None and machine.d2h_gb_s is not None:
        kind = "pinned" if machine.pinned else "pageable"
        table.add_row(f"host to device, {kind}", _number(machine.h2d_gb_s))
        table.add_row(f"device to host, {kind}", _number(machine.d2h_gb_s))
    table.add_row("256-byte rows gathered one by one from the host tier", _number(machine.gather_gb_s))
    return table


def _links(machine: Machine) -> Table:
    table = _table("copy of", "host to device", "device to host")
    for link in machine.links:
        table.add_row(size(link.size).replace(".0", ""), _number(link.h2d_gb_s), _number(link.d2h_gb_s))
    return table


def _gathers(machine: Machine) -> Table:
    table = _table("rows gathered", "GB/s", "µs")
    for gather in machine.gathers:
        took_us = gather.rows * 256 / gather.gb_s / 1e3
        table.add_row(f"{gather.rows:,}", _number(gather.gb_s), f"{took_us:,.0f}")
    return table


def _system(machine: Machine, host: Host, slot: PciSlot | None) -> Table:
    table = _table("system", "", justify="left")
    if not machine.host_only:
        table.add_row("device memory", size(machine.device_bytes))
        if slot is not None and slot.link:
            table.add_row("PCIe link", slot.link + (f" (at best {slot.best_link})" if slot.best_link else ""))
    table.add_row("CPU", f"{host.cpu}, {host.cores} cores, torch uses {host.threads} threads")
    flags = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in host.flags.items())
    table.add_row("instructions", flags or "not known")
    table.add_row("RAM", f"{size(host.memory_bytes)}, free {size(host.free_bytes)}")
    if not machine.host_only:  # else nothing is pinned
        limit = "unlimited" if host.locked_limit is None else size(host.locked_limit)
        table.add_row("pinned memory", f"locked-memory limit (ulimit -l) {limit}; free RAM bounds it in any case")
    for node in host.nodes:
        gpu = ", the GPU's" if slot is not None and slot.numa_node == node.index else ""
        table.add_row(f"NUMA node {node.index}{gpu}", f"CPUs {node.cpus}, {size(node.memory_bytes)}")
    if machine.matvec_gb_s is not None:
        table.add_row("weights in a decode step", f"{machine.matvec_gb_s:.1f} GB/s")
        table.add_row("a layer's small operators", f"{machine.layer_ms:.2f} ms beside its weights")
    table.add_row("matrix products", f"{machine.compute_tflops:.2f} TFLOP/s")
    table.add_row("versions", ", ".join(f"{name} {value or '-'}" for name, value in machine.versions.items()))
    return table


def _findings(console: Console, machine: Machine, found: Sequence[Finding]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for finding in found:
        style = "red" if finding.level == "missing" else "yellow"
        console.print(Text.assemble((f"{finding.level}: ", style), finding.what))
        console.print(Padding(f"→ {finding.way_out}", (0, 0, 0, 2)), style="dim")
        for command in finding.commands:
            put(console, f"    {command}")
    if not found:
        console.print("nothing is missing for the fast path", style="green")
    if machine.host_only:
        console.print(WITH_A_GPU, style="dim")


def _table(*headings: str, justify: Any = "right") -> Table:
    table = plain_table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify=justify if number else "left", overflow="fold")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"
