#!/usr/bin/env bash
# Run a command with torch's CUDA build on a GPU that computes nothing.
#
#   bash tests/cuda_without_gpu/run.sh python tests/cuda_without_gpu/check.py
#   STAND_IN_SM=86 STAND_IN_GB=24 bash tests/cuda_without_gpu/run.sh python train.py …
#
# The first call makes a virtual environment (5 GB) and compiles the stand-in, which takes minutes
# and needs gcc. Everything is in out/cuda_without_gpu, or in $CUDA_WITHOUT_GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${CUDA_WITHOUT_GPU:-$root/out/cuda_without_gpu}
venv=$folder/venv

if [ ! -f "$venv/complete" ]; then
    echo "installing torch's CUDA build into $venv" >&2
    python3 -m venv "$venv"
    version=$(sed -n 's/^torch==//p' "$root/requirements.txt")
    # Three equals signs pass over a CPU build, whose version is $version+cpu.
    "$venv/bin/pip" install --quiet --disable-pip-version-check "torch===$version"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$root/requirements.txt"
    touch "$venv/complete"
fi
if [ ! -f "$folder/stand_in/complete" ] ||
    [ -n "$(find "$here/stand_in" -newer "$folder/stand_in/complete")" ]; then
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    bash "$here/stand_in/build.sh" "$packages" "$folder/stand_in"
    touch "$folder/stand_in/complete"
fi

export PATH=$venv/bin:$PATH PYTHONPATH=$root PYTHONDONTWRITEBYTECODE=1
export LD_PRELOAD=$folder/stand_in/libstand_in.so LD_LIBRARY_PATH=$folder/stand_in
export TRITON_LIBCUDA_PATH=$folder/stand_in STAND_IN=$folder/stand_in/libstand_in.so
export TORCHINDUCTOR_CACHE_DIR=$folder/inductor TRITON_CACHE_DIR=$folder/triton
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$@"
