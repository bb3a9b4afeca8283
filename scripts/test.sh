#!/usr/bin/env bash
# Lint, types and tests.
#
#   bash scripts/test.sh            # everything that CI runs, under ten minutes on two cores
#   bash scripts/test.sh --slow     # only the slow tests
#   bash scripts/test.sh tests/test_sophia.py -k gnb      # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements-dev.txt

if [ "${1:-}" = --slow ]; then
    shift
    exec python -m pytest -m slow "$@"
fi
ruff check .
ruff format --check .
mypy
# Two tests at once with one thread each: the models are too small for a second thread.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal -m "not slow" --durations=10 "$@"
