#!/usr/bin/env bash
# Everything once, small: environment, data, four optimizers, tables, plot, text.
#
#   bash scripts/quickstart.sh [OUT_DIR]       # default: out; needs Python 3.11 or newer and pip
#
# If interrupted, run the same command again. VENV names another environment than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out}
source scripts/environment.sh requirements.txt

# A run per core with one thread each: a quarter faster than one run after another on all cores, and
# less disturbed by other processes (docs/performance.md, "Other load").
jobs=$(python -c 'import os; print(min(4, os.cpu_count()))')
python data/stdlib/prepare.py --bpe
python scripts/run.py configs/quickstart.toml --jobs="$jobs" --train.out_dir="$out"
echo
python scripts/compare.py "$out/quickstart"
echo "== a sample from sophia-g"
python scripts/sample.py "$out/quickstart/sophia-g" --prompt '    """Return the ' --tokens 120 \
    --temperature 0.6
