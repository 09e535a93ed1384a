#!/usr/bin/env bash
# The rows and the plots of docs/fidelity.md, on the demo model: about a minute for each place of a text and as much
# again for every eight policies, on two quiet cores. Arguments are further texts, each measured apart from the
# reference prose. Started again it goes on where it was; FRESH=1 measures everything anew. KCACHE is the command to run.
set -euo pipefail
cd "$(dirname "$0")/.."

out=docs/fidelity
kcache=${KCACHE:-kcache}
mkdir -p "$out"
[ -z "${FRESH:-}" ] || rm -f "$out"/*.jsonl

ablation=()
for file in benchmarks/ablation/*.toml; do
	ablation+=(--policy "$file")
done
for text in "" "$@"; do
	name=$(basename "${text:-reference}" .txt)
	$kcache eval fidelity ${text:+--text "$text"} --topn 32,64,128,256 --policy default --policy paper \
		--resume --output "$out/$name.jsonl" --plot "docs/images/fidelity-$name.svg"
	$kcache eval fidelity ${text:+--text "$text"} --topn 64,128 --policy default "${ablation[@]}" \
		--resume --output "$out/$name-ablation.jsonl"
done
# The profile of the demo model is found on the first of the texts.
[ $# = 0 ] || $kcache tune smollm2 --text "$1" --ctx 7680 --steps 64 --places 2 --profile kcache/profiles/smollm2.toml \
	--overwrite --resume --output "$out/tune-$(basename "$1" .txt).jsonl"
${PYTHON:-python3} benchmarks/page.py
