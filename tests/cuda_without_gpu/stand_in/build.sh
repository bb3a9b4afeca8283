#!/usr/bin/env bash
# Compile the stand-in: build.sh SITE_PACKAGES FOLDER, with gcc and nm.
#
# FOLDER gets libstand_in.so (runtime, cuBLAS and NCCL, to be preloaded) and libcuda.so.1. Every
# symbol that torch's libraries want and these files do not define becomes a function that does
# nothing and returns 0, which is CUDA's success.
set -euo pipefail
cd "$(dirname "$0")"
packages=$1 folder=$2
headers=$packages/triton/backends/nvidia/include
mkdir -p "$folder"

compile() { gcc -O1 -w -fPIC -I"$headers" -I. "$@"; }

# Prints what torch's libraries want, and what Triton's C code calls, which is compiled later.
wanted() {
    local libraries=$packages/torch/lib
    nm -D --undefined-only "$libraries"/lib{torch_cuda,torch_cuda_linalg,c10_cuda}.so \
        "$libraries"/lib{torch_python,caffe2_nvrtc}.so | awk '{sub(/@.*/, "", $2); print $2}'
    grep -ohE '\bcu[A-Z][A-Za-z0-9]+' "$packages/triton/backends/nvidia/driver.c"
}

# Usage: missing PATTERN SOURCE… prints the functions for what SOURCE does not define.
missing() {
    local pattern=$1
    shift
    local objects=()
    for source in "$@"; do
        compile -c "$source" -o "$folder/${source%.c}.o"
        objects+=("$folder/${source%.c}.o")
    done
    nm "${objects[@]}" | awk '$2 == "T" {print $3}' | sort -u >"$folder/defined"
    wanted | grep -E "$pattern" | sort -u |
        comm -23 - "$folder/defined" | sed 's/.*/int &(void) { return 0; }/'
}

missing '^(__cuda|cuda|cublas|nccl)' cudart.c cublas.c nccl.c >"$folder/rest.c"
compile -shared cudart.c cublas.c nccl.c "$folder/rest.c" -o "$folder/libstand_in.so" -ldl -lpthread

missing '^cu[A-Z]' driver.c >"$folder/rest_driver.c"
compile -shared -Wl,-soname,libcuda.so.1 driver.c "$folder/rest_driver.c" \
    -o "$folder/libcuda.so.1" -ldl
ln -sf libcuda.so.1 "$folder/libcuda.so"
