#!/usr/bin/env bash
# Everything under results/cpu/ but the search for the settings, run again. About two hours on two cores.
#
#   bash scripts/results.sh [JOBS]       # default: 2 runs at once
#
# Stopped half-way, the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${1:-2}
source scripts/environment.sh requirements.txt

python data/stdlib/prepare.py
run() { python scripts/run.py "configs/$1.toml" --scale=cpu --jobs="$jobs" "${@:2}"; }
compare() { python scripts/compare.py "${@:2}" --out "results/cpu/$1"; }
sweep() {
    run "$1" --sweep
    compare "$1" "out/$1-cpu"
    python scripts/figures.py sweep "out/$1-cpu" --out "results/cpu/$1" "${@:2}"
}

python scripts/toy.py --out results/cpu/figure2
run gpt2_30m --seeds=3 --horizons=1,2,0.5
compare gpt2_30m out/gpt2_30m-cpu
python scripts/figures.py clipped out/gpt2_30m-cpu --out results/cpu/gpt2_30m
python scripts/hessian.py histogram out/gpt2_30m-cpu/adamw --out results/cpu/figure3
python scripts/hessian.py estimators --out results/cpu/estimators
run released_125m --seeds=2
compare released_125m out/released_125m-cpu --reference=tuned-adamw
sweep ablation_ingredients --x=optimizer.lr
sweep ablation_rho --x=optimizer.rho
sweep ablation_rho_beta2 --x=optimizer.beta2 --y=optimizer.rho
sweep ablation_interval --x=optimizer.lr --y=optimizer.hessian_interval
sweep ablation_attention --x=optimizer.lr
sweep other_optimizers --x=optimizer.lr
sweep masked_lm --x=optimizer.lr
run gpt2_125m
run gpt2_355m
python scripts/figures.py sizes out/gpt2_30m-cpu out/gpt2_125m-cpu out/gpt2_355m-cpu --out results/cpu/figure1c
