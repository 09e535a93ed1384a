"""Time every Triton kernel of the decode step at real shapes on a CUDA device, beside the bytes it cannot avoid.

    python3 -m benchmarks.kernels [--json FILE] [--cases A,B] [--budget-s 55]

Each kernel is captured several times in a CUDA graph, over inputs that differ from launch to launch and exceed the
L2 cache, and the median of the replays is given. Floors use ceilings measured in the same run: a device copy for HBM,
a bulk copy from pinned memory for the link (:mod:`kcache.speed.machine`). Before anything is timed, every case is
compared with the reference backend. Variants are compiled in parallel processes first. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton

from benchmarks.kernel_inputs import CASES, Inputs, compile_shard, precompile
from kcache.backends.base import DecodeStep
from kcache.backends.reference import ReferenceBackend
from kcache.backends.triton import Chip, Tuning, chip_of, triton_decode
from kcache.policy import Policy
from kcache.speed.machine import measure as measure_machine


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 15) -> tuple[float, float]:
    """Microseconds per call (median over replays, and half the spread of the middle half), in one captured graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


@dataclass
class Row:
    """One measurement."""

    case: str
    kernel: str
    variant: str
    us: float
    spread_us: float
    hbm_bytes: int
    link_bytes: int = 0
    floor_us: float = 0.0

    def with_floor(self, ceiling: dict[str, float]) -> Row:
        """Add the time the bytes alone take, device memory and link at the same time."""
        hbm, link = self.hbm_bytes / ceiling["hbm_gb_s"] / 1e3, self.link_bytes / ceiling["link_gb_s"] / 1e3
        return replace(self, floor_us=max(hbm, link))

    def line(self) -> str:
        """One line of the table."""
        ratio = f"{self.us / self.floor_us:6.2f}x" if self.floor_us else "      -"
        return (
            f"{self.case:28} {self.kernel:12} {self.variant:58} {self.us:8.1f} ±{self.spread_us:5.1f} us"
            f"  floor {self.floor_us:7.1f} {ratio}"
        )


def measure(inputs: Inputs, base: Tuning) -> Iterator[Row]:
    """Time all kernels of a case at the given launch parameters."""
    case, queries = inputs.case, inputs.queries
    score_bytes, pick_bytes = case.rows * case.group * case.length * 4, case.rows * case.topn * case.dim * 2
    workspace, total = inputs.workspace(base), case.kv_bytes + case.tail_bytes
    steps = [inputs.step(workspace, index) for index in range(len(queries))]
    plan = f"splits {workspace.score_splits}+{workspace.tail_splits}"
    yield Row(case.name, "append", "", *graph_us([inputs.append] * 8), 0)
    scores = [partial(inputs.scores, step) for step in steps]
    yield Row(case.name, "score", plan, *graph_us(scores), case.kv_bytes + score_bytes)
    unfetched = [partial(inputs.scores_and_tail, step) for step in steps]
    yield Row(case.name, "score, tail", plan, *graph_us(unfetched), total)
    yield Row(case.name, "step", "no hot rows", *graph_us([step.run for step in steps]), total, pick_bytes)
    warm = inputs.step(workspace, 0, inputs.hot())
    warm.run()
    yield Row(case.name, "step", "all hot", *graph_us([warm.run] * 8), total)
    evenly = inputs.workspace(base, "even")
    even = [inputs.step(evenly, index) for index in range(len(queries))]
    yield Row(case.name, "step", "exactly N", *graph_us([step.run for step in even]), total, pick_bytes)
    weights = torch.rand(case.rows, case.length, device=inputs.device)
    yield Row(case.name, "torch.topk", "for comparison", *graph_us([lambda: weights.topk(case.topn)] * 4), 0)
    dense = inputs.dense(base)
    calls = [partial(dense, query) for query in queries]
    yield Row(case.name, "dense", "", *graph_us(calls), 2 * case.kv_bytes)
    attend = torch.nn.functional.scaled_dot_product_attention
    calls = [
        partial(attend, query.unsqueeze(2), inputs.keys, inputs.near, enable_gqa=case.group > 1) for query in queries
    ]
    yield Row(case.name, "torch sdpa", "for comparison", *graph_us(calls), 2 * case.kv_bytes)


def check(inputs: Inputs, base: Tuning) -> dict[str, float]:
    """Relative errors against the reference backend and against fp32 attention, on fresh inputs."""
    query, case = inputs.queries[0], inputs.case
    step = DecodeStep(
        query, inputs.keys, inputs.values, case.length, inputs.scaling, Policy(topn=case.topn),
        lowrank=inputs.lowrank, threshold=inputs.thresholds[0],
    )  # fmt: skip
    torch.cuda.synchronize()
    want = ReferenceBackend().decode(step)
    out, picks, mass = triton_decode(
        query, inputs.keys, inputs.values, case.length, scaling=inputs.scaling, lowrank=inputs.lowrank,
        threshold=inputs.thresholds[0], workspace=inputs.workspace(base),
        out=torch.full_like(query, float("nan")),
    )  # fmt: skip
    chosen, wanted = (
        torch.zeros(case.rows, case.length + 1, dtype=torch.bool, device=query.device).scatter_(
            1, torch.where(rows < 0, case.length, rows).view(case.rows, -1).long(), True
        )[:, :-1]
        for rows in (picks, want.picks)
    )
    same = ((chosen & wanted).sum() / (chosen | wanted).sum()).item()
    dense_want = torch.nn.functional.scaled_dot_product_attention(
        query[:1].float().unsqueeze(2), inputs.keys[:1].float(), inputs.near[:1].float(), enable_gqa=case.group > 1
    ).squeeze(2)
    return {
        "out_error": relative(out, want.out),
        "mass_error": relative(mass, want.mass),
        "same_picks": same,
        "dense_error": relative(inputs.dense(base)(query)[:1], dense_want),
    }


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was wanted."""
    return ((actual.float() - wanted.float()).norm() / wanted.float().norm()).item()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--cases", default="", help="numbers of cases, comma separated (default: all)")
    parser.add_argument("--budget-s", type=float, default=55.0, help="start nothing new after this many seconds")
    parser.add_argument("--compile-shard", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--chip", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    began = time.perf_counter()
    cases = [CASES[int(number)] for number in options.cases.split(",") if number] or CASES
    if options.compile_shard is not None:
        compile_shard(options.compile_shard, cases, Chip(**json.loads(options.chip)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: kernel times can only be taken on one")
    device = torch.device("cuda", torch.cuda.current_device())
    name, chip = torch.cuda.get_device_name(device), chip_of(device)
    same = ["--chip", json.dumps(asdict(chip)), "--cases", options.cases]
    compile_s = precompile(same)
    base = Tuning(chip=chip)
    host = torch.empty(max(case.kv_bytes for case in cases) // 2, dtype=torch.bfloat16).pin_memory()
    machine = measure_machine(device)
    ceiling = {"hbm_gb_s": machine.memory_gb_s, "link_gb_s": machine.h2d_gb_s}
    report: dict[str, object] = {
        "env": {
            "device": name, "chip": asdict(chip), "torch": torch.__version__,
            "triton": triton.__version__, "cuda": torch.version.cuda, "compile_s": compile_s,
        },
        "ceilings": ceiling, "cases": [asdict(case) for case in cases],
    }  # fmt: skip
    print(f"{name}: HBM {ceiling['hbm_gb_s']:.0f} GB/s, link {ceiling['link_gb_s']:.1f} GB/s; "
          f"compiled in {compile_s:.1f} s", flush=True)  # fmt: skip
    rows: list[Row] = []
    checks: dict[str, dict[str, float]] = {}
    for case in cases:
        if time.perf_counter() - began > options.budget_s:
            print(f"{case.name}: left out, the time is up")
            continue
        torch.cuda.empty_cache()
        inputs = Inputs(case, device, host)
        checks[case.name] = check(inputs, base)
        print(case.name, " ".join(f"{key} {value:.2e}" for key, value in checks[case.name].items()), flush=True)
        for row in measure(inputs, base):
            rows.append(row.with_floor(ceiling))
            print(rows[-1].line(), flush=True)
        del inputs
    report |= {"checks": checks, "rows": [asdict(row) for row in rows], "total_s": time.perf_counter() - began}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"done in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
