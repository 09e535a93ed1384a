"""How much faster a batch job gets with two Ray workers than with one, on this machine.

Runs the same job by itself, with one worker and with two, and prints for each the prompts per second once all workers
are at work (from the journal, whose lines appear as batches finish), and the whole time with start-up. The outputs
must be the same bytes.

    python -m benchmarks.ray_workers [--model smollm2] [--batches 8] [--tokens 16] [--chars 400]
"""

from __future__ import annotations

import argparse
import json
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
        outputs = set()
        for label, workers in (("by itself", 0), ("1 worker", 1), ("2 workers", 2)):
            out = folder / f"{workers}.jsonl"
            outputs.add(_run(label, args, folder, out, workers))
        print("the outputs are the same bytes" if len(outputs) == 1 else "THE OUTPUTS DIFFER")


def _run(label: str, args: argparse.Namespace, folder: Path, out: Path, workers: int) -> bytes:
    command = [sys.executable, "-m", "kcache_cli", "generate", args.model, "-i", str(folder / "in.jsonl")]
    command += ["-o", str(out), "-n", str(args.tokens), "--temperature", "0", "--batch-size", str(BATCH)]
    if workers:
        command += ["--engine", "ray", "--workers", str(workers)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal, times = out.with_name(out.name + ".kcache"), []
    while process.poll() is None:
        done = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
        if done > len(times):
            times += [time.perf_counter()] * (done - len(times))
        time.sleep(0.01)
    said = (process.stderr.read() if process.stderr else "").strip()
    first = max(1, workers)
    rate = BATCH * (len(times) - first) / (times[-1] - times[first - 1])
    print(f"{label}: {rate:.3f} prompts/s at work; {time.perf_counter() - began:.1f} s in all; {said}", flush=True)
    return out.read_bytes()


if __name__ == "__main__":
    main()
