#!/usr/bin/env bash
# The rows of docs/benchmarks.md that a machine without a GPU can give: about ten minutes on two quiet cores.
# TEXT=1 adds real prefills of text and what TopN costs in answers, some ten minutes more. Started again it goes on
# where it was; FRESH=1 measures everything anew. KCACHE is the command to run.
set -euo pipefail
cd "$(dirname "$0")/.."

out=docs/benchmarks
kcache=${KCACHE:-kcache}
mkdir -p "$out"
[ -z "${FRESH:-}" ] || rm -f "$out"/cpu-{1,2,3}.jsonl ${TEXT:+"$out/cpu-text.jsonl"}

for run in 1 2 3; do
	$kcache bench --device cpu --dtype bfloat16 --ctx 256,2k,8k,32k --batch 1 --resume --output "$out/cpu-$run.jsonl"
	$kcache bench --device cpu --dtype bfloat16 --ctx 8k --batch 8 --resume --output "$out/cpu-$run.jsonl"
done
[ -n "${TEXT:-}" ] || exec ${PYTHON:-python3} benchmarks/page.py
$kcache bench --device cpu --dtype bfloat16 --ctx 2k,7k --topn 64,128,256 --engine kcache,dense,hf-static,hf-dynamic \
	--real-prefill --fidelity -r 3 --resume --output "$out/cpu-text.jsonl"
${PYTHON:-python3} benchmarks/page.py
