// cuBLAS and cuBLASLt of a GPU that computes nothing: matrix products are counted.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"

int cublasCreate_v2(void **handle) { *handle = (void *)64; return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }

#define PRODUCT(name) int name(void) { stand_in_add(GEMMS, 1); return 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasLtMatmul)

int cublasLtMatmulDescCreate(void **p, int a, int b) { *p = malloc(64); return 0; }
int cublasLtMatrixLayoutCreate(void **p, int type, uint64_t rows, uint64_t columns, int64_t lead) {
    *p = malloc(64);
    return 0;
}
int cublasLtMatmulPreferenceCreate(void **p) { *p = malloc(64); return 0; }
int cublasLtMatmulDescDestroy(void *p) { free(p); return 0; }
int cublasLtMatrixLayoutDestroy(void *p) { free(p); return 0; }
int cublasLtMatmulPreferenceDestroy(void *p) { free(p); return 0; }
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *op, void *a, void *b, void *c, void *d, void *preference, int requested,
    void *results, int *found) {
    memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t
    *found = 1;
    return 0;
}
size_t cublasLtGetVersion(void) { return 130101; }
