#!/usr/bin/env bash
# Everything that wants a GPU: a first look at what the design rests on, the benchmark, then the tests. Each runs
# whatever became of the one before, and the exit code tells if any failed. OUT is the folder for the figures, PYTHON
# the interpreter; arguments go to the benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-docs/benchmarks}
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

failed=0
run() { "$@" || failed=1; }

run "$python" benchmarks/first_look.py --output "$out/first_look.json"
run "$python" -m benchmarks.gpu --folder "$out" "$@"
workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n auto") # compiling kernels takes longest
kernels=(tests/triton/test_triton_{device,hot_rows,decode_step,append,dense}.py)
run "$python" -m pytest $workers --failures "$out/failures.txt" tests/gpu "${kernels[@]}"
exit $failed
