/*
 * cuBLAS and cuBLASLt: what torch calls of them, without a multiplication.
 *
 * Loaded before the real libraries, which stay where they are: those would look for a real device.
 */
#include <stdlib.h>
#include <string.h>

#define DOES_NOTHING(name) \
    int name(void) { return 0; }

static int make(void **handle) {
    *handle = calloc(1, 256);
    return 0;
}

int cublasCreate_v2(void **handle) { return make(handle); }

int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasGemmEx)
DOES_NOTHING(cublasGemmEx_64)
DOES_NOTHING(cublasSgemm_v2)
DOES_NOTHING(cublasDgemm_v2)
DOES_NOTHING(cublasSgemmEx)
DOES_NOTHING(cublasGemmStridedBatchedEx)
DOES_NOTHING(cublasSgemmStridedBatched)
DOES_NOTHING(cublasDgemmStridedBatched)
DOES_NOTHING(cublasSdot_v2)
DOES_NOTHING(cublasSgemv_v2)

int cublasLtCreate(void **handle) { return make(handle); }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return make(made); }
int cublasLtMatrixLayoutCreate(void **made, int type, unsigned long rows, unsigned long columns,
                               long leading) {
    return make(made);
}
int cublasLtMatmulPreferenceCreate(void **made) { return make(made); }

/* One algorithm, about which nothing is known but that it is there. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *found, int *count) {
    memset(found, 0, 8);
    *count = 1;
    return 0;
}

DOES_NOTHING(cublasLtDestroy)
DOES_NOTHING(cublasLtMatmul)
DOES_NOTHING(cublasLtMatmulDescInit_internal)
DOES_NOTHING(cublasLtMatmulDescDestroy)
DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutInit_internal)
DOES_NOTHING(cublasLtMatrixLayoutDestroy)
DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceInit_internal)
DOES_NOTHING(cublasLtMatmulPreferenceDestroy)
DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
