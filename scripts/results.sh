#!/usr/bin/env bash
# Run everything under results/cpu/ again, except the first rounds of the search. About two hours on
# two cores.
#
#   bash scripts/results.sh [JOBS]       # default: 2 runs at once
#
# If interrupted, run the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${1:-2}
source scripts/environment.sh requirements.txt requirements-extras.txt

python data/stdlib/prepare.py
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

python scripts/toy.py --out results/cpu/figure2
python scripts/hessian.py estimators --out results/cpu/estimators

# The last round of the search for the settings. The runs after it have other seeds.
run gpt2_30m --sweep --seeds=2 --train.out_dir=out/search4
table search out/search4
figure sweep search out/search4 --x=optimizer.lr --y=optimizer.beta1

run gpt2_30m --train.seed=1340 --seeds=5 --horizons=1,2,0.5
compare gpt2_30m out/gpt2_30m-cpu
figure horizons gpt2_30m out/gpt2_30m-cpu
figure clipped gpt2_30m out/gpt2_30m-cpu
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

run gpt2_125m
run gpt2_355m
figure sizes figure1c out/gpt2_30m-cpu out/gpt2_125m-cpu out/gpt2_355m-cpu
