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

python data/stdlib/prepare.py
for run in adamw lion sophia-g sophia-h; do
    echo "== $run"
    python train.py configs/quickstart.toml --run="$run" --train.out_dir="$out" --resume
done
echo
python scripts/compare.py "$out/quickstart"
echo "== a sample from sophia-g"
python scripts/sample.py "$out/quickstart/sophia-g" --prompt "def " --tokens 300
