// What the stand-in counts. ../stand_in.py reads the counters by these names.
#pragma once

enum counter {
    KERNELS,      // launches of torch's own kernels, memsets included
    TRITON,       // launches of kernels compiled by Triton
    GEMMS,        // calls of cuBLAS
    TO_HOST,      // copies from the device to the host
    TO_DEVICE,    // copies from the host to the device
    SYNCS,        // calls in which the host waits for the device
    ALLOCATIONS,  // cudaMalloc
    ALL_REDUCES,  // NCCL
    ALL_REDUCED_BYTES,
    BROADCASTS,
    N_COUNTERS
};

void stand_in_add(enum counter which, long long amount);
