#!/usr/bin/env bash
# Run what is in results/cpu/ again, except tuning and the sweep of widths. Some hours on two cores.
#
#   bash scripts/results.sh [JOBS]       # default: 2 runs at once
#
# If interrupted, run the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${1:-2}
source scripts/environment.sh requirements.txt requirements-extras.txt

python data/stdlib/prepare.py --bpe
run() { python scripts/run.py "configs/cpu/$1.toml" --jobs="$jobs" --train.seed=2001 "${@:2}"; }
compare() { python scripts/compare.py "${@:2}" --out "results/cpu/$1"; }

run comparison --runs=adamw,sophia-g --seeds=10 --horizons=2
run comparison --seeds=6 --horizons=2
run comparison --runs=adamw,lion,sophia-g,sophia-h --seeds=6
compare comparison out/comparison-cpu
python scripts/figures.py differences out/comparison-cpu --out results/cpu/comparison

run batch_size --seeds=6
compare batch_size out/batch_size-cpu

for width in 32 96; do
    run widths --runs=adamw,sophia-g,sophia-h --seeds=3 --model.n_embd=$width \
        --model.n_head=$((width / 32)) --train.out_dir="out/widths_$width"
done
width_64=(out/comparison-cpu/{adamw,sophia-g,sophia-h}{,",seed=2002",",seed=2003"})
compare sizes out/widths_* "${width_64[@]}"
python scripts/figures.py sizes out/widths_* "${width_64[@]}" --out results/cpu/sizes

run ablation_interval --sweep --seeds=4
compare ablation_interval out/ablation_interval-cpu --reference=sophia-g
run ablation_ingredients --runs=clip-only,empirical-fisher --seeds=4
compare ablation_ingredients out/comparison-cpu/sophia-g out/comparison-cpu/sophia-g,seed=200[234] \
    out/ablation_ingredients-cpu --reference=sophia-g

python scripts/toy.py --out results/cpu/figure2
python scripts/hessian.py histogram out/comparison-cpu/adamw,max_steps=480 --out results/cpu/figure3
python scripts/hessian.py estimators --out results/cpu/estimators
