"""When the parts of a decode step's launch end on the device: time stamps of each row of work.

    python3 benchmarks/gpu_stamps.py batch8_32k/kcache [--compile-only]

Works on a copy of kcache whose kernels store the device's clock into scratch memory that lists of picks leave free.
A stamp is a barrier as well, so that a step takes a little longer. Times are microseconds from the first row's
beginning, rows of work in the order in which their last score came.
"""

from __future__ import annotations

import argparse
import gc
import re
import shutil
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "begun", "scored", "log-sum-exp", "blocks", "rows", "picked", "refined", "weighed", "fetched", "tail from",
    "tail to", "last sum", "output",
)  # fmt: skip
"""In the order of their stamps: a row's first program begins; its scores are complete; and so on to its output."""
ROOM = 16

STAMP = f"""

@triton.jit
def stamp(found, row, capacity, K: tl.constexpr):
    tl.debug_barrier()
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [row], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(found + row.to(tl.int64) * capacity + capacity - {ROOM} + K, now)
"""
BEFORE: dict[str, dict[str, str]] = {
    "above.py": {
        "    count = list_blocks(": "log-sum-exp",
        "    tl.debug_barrier()\n    total = list_rows(": "blocks",
        "    if total > MOST:\n": "rows",
    },
    "topn.py": {
        "    kept = PICK(": "scored",
        "    tl.debug_barrier()\n    norm = tl.load(lse": "picked",
        "    own = (row *": "refined",
        "    tl.debug_barrier()\n    v_rows = values": "weighed",
        "    finish(\n        tickets, done, partial, shares, held, base, basis, out, mass, grown, row, batch, head,\n"
        "        batch *": "fetched",
        "        score_piece(\n            query, keys": "begun",
        "            tail_share(\n": "tail from",
        "            finish(\n": "tail to",
    },
    "gather.py": {
        "        tl.debug_barrier()\n        finish_row(": "last sum",
        "        tl.store(tickets + row, 0)\n": "output",
    },
}
"""In which file, and before what, a stamp is taken."""
FIRST_ONLY = {"begun", "tail from", "tail to"}
"""Stamps of many programs of a row, of which the first one's counts."""


def copy_with_stamps(to: Path) -> None:
    """Copy the source and put the stamps in.

    Raises
    ------
    ValueError
        If a place for one is not there exactly once: the source has changed since.
    """
    for name in ("kcache", "benchmarks"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    kernels = to / "kcache" / "backends" / "triton"
    common = kernels / "common.py"
    common.write_text(common.read_text() + STAMP)
    for name, places in BEFORE.items():
        text = (kernels / name).read_text()
        for place, part in places.items():
            if text.count(place) != 1:
                raise ValueError(f"{name} has {place!r} {text.count(place)} times")
            indent = re.match(" *", place)[0]  # type: ignore[index]
            call = f"stamp(found, row, capacity, {PARTS.index(part)})\n"
            guarded = f"{indent}if nth == 0:\n{indent}    {call}" if part in FIRST_ONLY else f"{indent}{call}"
            text = text.replace(place, guarded + place)
        # ``finish`` is given neither the memory nor its row's length.
        text = re.sub(r"(tail_splits,\s+programs,\s+stride_ob, stride_oh,)\n", r"\1 found, capacity,\n", text)
        first_import = "from kcache.backends.triton."
        text = text.replace(first_import, f"from kcache.backends.triton.common import stamp\n{first_import}", 1)
        (kernels / name).write_text(text)


def show(found: object) -> None:
    """Print the stamps in the scratch memory ``found`` ``[R, capacity]``."""
    ticks = found[:, -ROOM:].cpu()  # type: ignore[index]
    at = ((ticks - ticks[:, 0].min()).double() / 1e3)[:, : len(PARTS)].tolist()
    rows = sorted(range(len(at)), key=lambda row: at[row][1])
    print("row   " + " ".join(f"{part:>11}" for part in PARTS))
    for row in dict.fromkeys([*rows[:: max(1, len(rows) // 12)], *rows[-8:]]):
        print(f"{row:5} " + " ".join(f"{moment:11.1f}" for moment in at[row]))
    for before, after in pairwise(PARTS):
        one, other = PARTS.index(before), PARTS.index(after)
        took = [moments[other] - moments[one] for moments in at]
        last = [at[row][other] - at[row][one] for row in rows[-8:]]
        print(f"{before:>11} to {after:11} median {statistics.median(took):6.1f} most {max(took):6.1f}, of the last "
              f"eight {statistics.median(last):6.1f}")  # fmt: skip
    print(f"last scores {at[rows[-1]][1]:.1f}, last output {max(moments[-1] for moments in at):.1f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--compile-only", action="store_true", help="for an H100, without a device")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_with_stamps(Path(folder))
        sys.path[0] = folder  # what is imported from here on is the copy
        import torch

        from benchmarks.gpu_compile import launch_all
        from benchmarks.gpu_jobs import all_jobs, make_runner, spec_of, trace_of
        from benchmarks.gpu_models import Models
        from benchmarks.precompile import compile_only
        from kcache.backends.triton import Chip, Tuning, Workspace

        job = {job.name: job for job in all_jobs()}[options.job]
        if options.compile_only:
            with compile_only() as compiled:
                launch_all(job, job.batch or 8, Tuning(chip=Chip()))
            print(*(name for name, _ in compiled))
            return
        lm = Models(torch.device("cuda", torch.cuda.current_device())).get(job.shape)
        memory = torch.cuda.get_device_properties(lm.device).total_memory
        runner = make_runner(job, lm, memory, spec_of(job))
        with trace_of(job, lm.device):
            runner.prepare()
            for _ in range(3):
                runner.turn()
                torch.cuda.synchronize()
                print(f"\na step: {statistics.median(runner.measured.turns[-1]):.2f} ms, {runner.measured.graph}")
                for scratch in gc.get_objects():
                    if type(scratch) is Workspace and scratch.found.shape[1] > ROOM:
                        show(scratch.found)


if __name__ == "__main__":
    main()
