// gemm.h: one fp32 matrix product on the calling thread. Everything that multiplies matrices on the CPU ends here.
#pragma once

#include <cstdint>

// c[M,N] = alpha * op(a)[M,K] op(b)[K,N] + beta * c, row-major with row strides lda, ldb, ldc. beta = 0 overwrites c
// whatever it holds. Throws std::logic_error when a dimension does not fit CBLAS's int.
struct GemmShape {
  int64_t m, n, k;
  bool transpose_a = false, transpose_b = false;
};
inline constexpr int64_t kGemmRows = 2048;  // of c, that one call of the library computes
void gemm(const GemmShape& shape, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
          float* c, int64_t ldc);

// Scratch that a matmul with a bf16 operand or result needs on each thread: fixed, whatever the matrices' size.
inline constexpr int64_t kTileRows = 512, kTileCols = 1024, kTileDepth = 384;
inline constexpr int64_t kMatmulScratchFloats = kTileRows * kTileCols + kTileRows * kTileDepth + kTileDepth * kTileCols;
