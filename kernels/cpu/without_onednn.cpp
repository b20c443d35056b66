// without_onednn.cpp: products in a build without oneDNN (`make BLAS=none`): our own, in fp32 only.
#include "kernels/cpu/gemm.h"

void gemm(const GemmShape& shape, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
          float* c, int64_t ldc) {
  plain_gemm(shape, alpha, a, lda, b, ldb, beta, c, ldc);
}

bool gemm_bf16(const GemmShape&, float, const bf16*, int64_t, const bf16*, int64_t, float, float*, int64_t, void*,
               size_t) {
  return false;
}

bool multiplies_bf16_faster() { return false; }
std::string gemm_description() { return "products of our own (no oneDNN)"; }
