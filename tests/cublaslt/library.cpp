// library.cpp: in place of kernels/cuda/cublaslt_library.cu, the functions of cublaslt.cpp.
#include "kernels/cuda/matmul.h"

const CublasLt& cublaslt() {
  static const CublasLt table = {.create = cublasLtCreate,
                                 .destroy = cublasLtDestroy,
                                 .version = cublasLtGetVersion,
                                 .status_name = cublasLtGetStatusName,
                                 .operation_create = cublasLtMatmulDescCreate,
                                 .operation_destroy = cublasLtMatmulDescDestroy,
                                 .operation_set = cublasLtMatmulDescSetAttribute,
                                 .layout_create = cublasLtMatrixLayoutCreate,
                                 .layout_destroy = cublasLtMatrixLayoutDestroy,
                                 .preference_create = cublasLtMatmulPreferenceCreate,
                                 .preference_destroy = cublasLtMatmulPreferenceDestroy,
                                 .preference_set = cublasLtMatmulPreferenceSetAttribute,
                                 .heuristic = cublasLtMatmulAlgoGetHeuristic,
                                 .check = cublasLtMatmulAlgoCheck,
                                 .matmul = cublasLtMatmul};
  return table;
}
