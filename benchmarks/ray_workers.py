"""How much faster a batch job gets with two Ray workers than with one, on this machine.

Runs the same job with one worker and with two, each computing with one thread, and prints for each the
prompts per second once all workers are at work (from the journal, whose lines appear as batches finish) and the whole
time with start-up; then the ratio. The outputs must be the same bytes.

    python -m benchmarks.ray_workers [--model smollm2] [--batches 8] [--tokens 16] [--chars 400]
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--chars", type=int, default=400)
    args = parser.parse_args()
    text = "\n".join(pydoc_data.topics.topics.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = len(text) // (BATCH * args.batches)
        prompts = [text[at * step : at * step + args.chars] for at in range(BATCH * args.batches)]
        (folder / "in.jsonl").write_text(
            "".join(json.dumps({"id": at, "prompt": prompt}) + "\n" for at, prompt in enumerate(prompts))
        )
        outputs, rates = set(), {}
        for workers in (1, 2):
            out = folder / f"{workers}.jsonl"
            rates[workers] = _run(args, folder, out, workers)
            outputs.add(out.read_bytes())
        print(f"two beside one: {rates[2] / rates[1]:.2f}")
        print("the outputs are the same bytes" if len(outputs) == 1 else "THE OUTPUTS DIFFER")


def _run(args: argparse.Namespace, folder: Path, out: Path, workers: int) -> float:
    command = [sys.executable, "-m", "kcache_cli", "generate", args.model, "-i", str(folder / "in.jsonl")]
    command += ["-o", str(out), "-n", str(args.tokens), "--temperature", "0", "--batch-size", str(BATCH)]
    command += ["--engine", "ray", "--workers", str(workers)]
    began = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    journal, times = out.with_name(out.name + ".kcache"), []
    try:
        while process.poll() is None:
            done = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
            if done > len(times):
                times += [time.perf_counter()] * (done - len(times))
            time.sleep(0.01)
    finally:
        process.terminate()
    said = (process.stderr.read() if process.stderr else "").strip()
    rate = BATCH * (len(times) - workers) / (times[-1] - times[workers - 1])
    print(
        f"{workers} of them: {rate:.3f} prompts/s at work; {time.perf_counter() - began:.1f} s in all; {said}",
        flush=True,
    )
    return rate


if __name__ == "__main__":
    main()
