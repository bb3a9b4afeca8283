#!/usr/bin/env bash
# Run what is in results/cpu/ again, except tuning and widths. Some hours on two cores.
#
#   bash scripts/results.sh [JOBS]       # default: 2 runs at once
#
# If interrupted, run the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${1:-2}
source scripts/environment.sh requirements.txt requirements-extras.txt

python data/stdlib/prepare.py
python data/stdlib/prepare.py --bpe
run() { python scripts/run.py "configs/cpu/$1.toml" --jobs="$jobs" "${@:2}"; }
compare() { python scripts/compare.py "${@:2}" --out "results/cpu/$1"; }
figure() { python scripts/figures.py "$1" "${@:3}" --out "results/cpu/$2"; }
table() {  # EXPERIMENT FOLDER: the table and the numbers; the crowded plot stays in out/
    python scripts/compare.py "$2"
    mkdir -p "results/cpu/$1"
    cp "$2/compare.md" "$2/compare.json" "results/cpu/$1"
}
sweep() {  # EXPERIMENT AXES: all combinations in its grids
    run "$1" --sweep
    table "$1" "out/$1-cpu"
    figure sweep "$1" "out/$1-cpu" "${@:2}"
}

run comparison --runs=adamw,sophia-g --train.seed=2001 --seeds=10 --horizons=2
run comparison --runs=sophia-h,lion --train.seed=2001 --seeds=6 --horizons=2
compare comparison out/comparison-cpu
figure differences comparison out/comparison-cpu

python scripts/toy.py --out results/cpu/figure2
python scripts/hessian.py estimators --out results/cpu/estimators

# The settings of the studies below: the last round of their search.
run gpt2_30m --sweep --seeds=2 --train.out_dir=out/search4
table search out/search4
figure sweep search out/search4 --x=optimizer.lr --y=optimizer.beta1

run gpt2_30m --runs=adamw --train.seed=1340
python scripts/hessian.py histogram out/gpt2_30m-cpu/adamw --out results/cpu/figure3

run released_125m --seeds=3
compare released_125m out/released_125m-cpu --reference=tuned-adamw
run ablation_schedule --sweep=axes
table ablation_schedule out/ablation_schedule-cpu
sweep ablation_ingredients --x=optimizer.lr
sweep ablation_rho --x=optimizer.rho
sweep ablation_rho_beta2 --x=optimizer.beta2 --y=optimizer.rho
sweep ablation_interval --x=optimizer.lr --y=optimizer.hessian_interval
sweep ablation_attention --x=optimizer.lr
sweep other_optimizers --x=optimizer.lr
sweep masked_lm --x=optimizer.lr
