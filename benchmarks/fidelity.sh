#!/usr/bin/env bash
# The rows, tables and plots of docs/fidelity.md, on the demo model: about fifteen minutes a text on one quiet core, and
# three hours for the rest. Arguments are further texts, each measured apart from the reference prose; the first of
# them is the one that the ablation and the profile are made on, the second what the profile is measured on. Started again it goes on where it was; FRESH=1 measures
# everything anew. KCACHE is the command to run, GEMMA a folder with a second model, DATA one with gsm8k/ and bbh/.
set -euo pipefail
cd "$(dirname "$0")/.."

out=docs/fidelity
kcache=${KCACHE:-kcache}
mkdir -p "$out"
[ -z "${FRESH:-}" ] || rm -f "$out"/*.jsonl

for text in "" "$@"; do
	name=$(basename "${text:-reference}" .txt)
	$kcache eval fidelity ${text:+--text "$text"} --topn 32,64,128,256 --policy default --policy paper \
		--resume --output "$out/$name.jsonl" --plot "docs/images/fidelity-$name.svg"
done

# What each part of the policy buys, there and on another model.
text=${1:-}
name=$(basename "${text:-reference}" .txt)
ablation=()
for file in benchmarks/ablation/no-*.toml; do
	ablation+=(--policy "$file")
done
heads=benchmarks/ablation/per-query-head.toml
$kcache eval fidelity ${text:+--text "$text"} --places 2 --topn 64,128 --policy default "${ablation[@]}" \
	--resume --output "$out/$name-ablation.jsonl"
$kcache eval fidelity ${text:+--text "$text"} --places 2 --topn 64 --policy "$heads" \
	--resume --output "$out/$name-ablation.jsonl"
if [ -n "${GEMMA:-}" ]; then
	$kcache eval fidelity "$GEMMA" ${text:+--text "$text"} --steps 64 --places 3 --topn 64 \
		--policy default --policy paper "${ablation[@]}" --policy "$heads" --resume --output "$out/gemma3-270m.jsonl"
	$kcache eval fidelity "$GEMMA" ${text:+--text "$text"} --ctx 15k --steps 64 --places 2 --topn 64 \
		--policy default --policy paper --policy benchmarks/ablation/no-dense-layers.toml \
		--resume --output "$out/gemma3-270m-15k.jsonl"
fi

$kcache eval needle --kind passkey,multikey,common-words,variable-tracking --topn 64,128 \
	--resume --output "$out/needles.jsonl" --plot docs/images/needles.svg
$kcache eval needle --kind multikey --ctx 7k --samples 4 --topn 64,128 --resume --output "$out/needles-multikey.jsonl"
$kcache eval needle --policy smollm2 --topn 128 --resume --output "$out/needles-profile.jsonl"
if [ -n "${DATA:-}" ]; then
	$kcache eval tasks --tasks gsm8k --data "$DATA" --limit 60 --topn 64,128 --resume --output "$out/gsm8k.jsonl"
	$kcache eval tasks --tasks bbh:date_understanding,bbh:sports_understanding --data "$DATA" --limit 40 \
		--topn 64,128 --resume --output "$out/bbh.jsonl"
	$kcache eval tasks --tasks bbh:causal_judgement -n 96 --data "$DATA" --limit 40 --topn 64,128 \
		--resume --output "$out/bbh.jsonl"
fi
[ -z "$text" ] || $kcache tune smollm2 --text "$text" --ctx 7680 --steps 64 --places 2 \
	--profile kcache/profiles/smollm2.toml --overwrite --resume --output "$out/tune-$name.jsonl"
[ -z "${2:-}" ] || $kcache eval fidelity --text "$2" --steps 128 --places 2 --policy smollm2 \
	--resume --output "$out/profile-$(basename "$2" .txt).jsonl"
${PYTHON:-python3} benchmarks/page.py
