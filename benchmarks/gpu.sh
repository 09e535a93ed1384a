#!/usr/bin/env bash
# Everything that wants a GPU: a first look at what the design rests on, the benchmark, then the tests. Each runs
# whatever became of the one before, and the exit code tells if any failed. OUT is the folder for the figures, PYTHON
# the interpreter, PARTS which of "look bench tests" to run; arguments go to the benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-docs/benchmarks}
parts=${PARTS:-look bench tests}
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

failed=0
run() { [[ " $parts " != *" $1 "* ]] || "${@:2}" || failed=1; }

run look "$python" benchmarks/first_look.py --output "$out/first_look.json"
run bench "$python" -m benchmarks.gpu --folder "$out" "$@"
workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n auto") # compiling kernels takes longest
kernels=(tests/triton/test_triton_{device,hot_rows,decode_step,append,narrow,dense,prompt}.py)
# One thread each, as the tests are many; a thread of its own ends a test that waits within the driver.
export OMP_NUM_THREADS=1
run tests "$python" -m pytest $workers -o timeout_method=thread --failures "$out/failures.txt" tests/gpu "${kernels[@]}"
exit $failed
