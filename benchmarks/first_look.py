"""A five-minute first look at a CUDA machine: the facts the engine's design rests on, measured one by one.

Prints a line per fact and one JSON object at the end. Needs torch with CUDA and triton.

    PYTHONPATH=. python3 benchmarks/first_look.py [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

from kcache.speed.rowcopy import gather_kernel
from kcache.tiers.pinned import pinned_empty


@triton.jit
def _put(source, host, position, D: tl.constexpr):
    columns = tl.arange(0, D)
    tl.store(host + tl.load(position) * D + columns, tl.load(source + columns))


def timed(call: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds of ``call`` on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def registered(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Host memory registered with the driver, as V's is, and how long that took in milliseconds."""
    began = time.perf_counter()
    tensor = pinned_empty(shape, dtype)
    return tensor, (time.perf_counter() - began) * 1e3


def copies(facts: dict[str, object]) -> None:
    """Bandwidth of device memory and of the link, by size."""
    a = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    facts["device_copy_tb_s"] = 2 * a.numel() * 2 / timed(lambda: b.copy_(a)) / 1e9
    host, register_ms = registered((2**29,), torch.bfloat16)
    facts["register_gib_ms"] = register_ms
    facts["is_pinned"] = host.is_pinned()
    for size in (2**12, 2**16, 2**20, 2**26):
        n = size // 2
        h2d = timed(lambda n=n: b[:n].copy_(host[:n], non_blocking=True))
        d2h = timed(lambda n=n: host[:n].copy_(b[:n], non_blocking=True))
        facts[f"h2d_{size}_gb_s"], facts[f"d2h_{size}_gb_s"] = size / h2d / 1e6, size / d2h / 1e6


def gathers(facts: dict[str, object]) -> None:
    """Scattered 256-byte rows read by a kernel straight from registered host memory, of 1 GiB and of 16."""
    for total, of in ((2**22, ""), (2**26, "_of_16_gib")):
        gathers_of(facts, total, of)


def gathers_of(facts: dict[str, object], total: int, of: str) -> None:
    """Gather out of ``total`` rows: far more of them need far more of the device's address translation."""
    dim = 128
    host, facts[f"register{of or '_of_1_gib'}_ms"] = registered((total, dim), torch.bfloat16)
    drawn = torch.randn(2**20, dim, dtype=torch.bfloat16)
    for number, piece in enumerate(host.split(len(drawn))):
        piece.copy_(drawn)
        piece[:, 0] = number
    for rows in (512, 2048, 8192, 32768, 131072):
        index = torch.randint(0, total, (rows,), device="cuda")
        out = torch.full((rows, dim), float("nan"), device="cuda", dtype=torch.bfloat16)
        best: tuple[float, int, int] | None = None
        for block in (4, 8, 16, 32):
            for warps in (1, 2, 4):
                grid = (triton.cdiv(rows, block),)
                arguments = (host, index, out, rows)
                sizes = {"D": dim, "ROWS": block, "num_warps": warps}
                took = timed(partial(gather_kernel[grid], *arguments, **sizes))
                if best is None or took < best[0]:
                    best = (took, block, warps)
        assert best is not None
        if not torch.equal(out.cpu(), host[index.cpu()]):
            raise RuntimeError("gathered rows are wrong")
        facts[f"gather_{rows}{of}_gb_s"] = rows * dim * 2 / best[0] / 1e6
        facts[f"gather_{rows}{of}_us"] = best[0] * 1e3
        facts[f"gather_{rows}{of}_config"] = best[1:]


def sorts(facts: dict[str, object]) -> None:
    """torch.topk on 64 rows, the cost a select kernel has to beat."""
    for length in (8192, 32768, 131072):
        scores = torch.rand(64, length, device="cuda")
        facts[f"topk128_64x{length}_us"] = timed(lambda scores=scores: scores.topk(128)) * 1e3


def graphs(facts: dict[str, object]) -> None:
    """Small operators launched one by one and replayed as a graph, and a kernel in it that writes to host memory."""
    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(32)]
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    host, _ = registered((64, 4096), torch.bfloat16)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> torch.Tensor:
        y = x
        for weight in weights:
            y = torch.nn.functional.rms_norm(y @ weight, (4096,))
        _put[(1,)](y, host, position, D=4096, num_warps=4, enable_fp_fusion=True)
        return y

    facts["step_of_64_operators_us"] = timed(step) * 1e3
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    began = time.perf_counter()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = step()
    facts["capture_ms"] = (time.perf_counter() - began) * 1e3
    facts["replay_of_64_operators_us"] = timed(graph.replay) * 1e3
    for row in (3, 40):
        x.normal_()
        position.fill_(row)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(host[row], out[0].cpu()) or not torch.equal(out, step()):
            raise RuntimeError("a replay gave something else than the step")


def main() -> None:
    """Run every look; one that fails is reported and the rest goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device")
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for look in (copies, gathers, sorts, graphs):
        try:
            look(facts)
        except Exception as error:
            facts[f"{look.__name__}_error"] = repr(error)
    for name, value in facts.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
