// gemm.h: one matrix product on the calling thread. Everything that multiplies matrices on the CPU ends here: oneDNN's
// product (onednn_gemm.cpp), or our own in a build without it (without_onednn.cpp, plain_gemm.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/tensor.h"

// Of c[m,n] = op(a)[m,k] op(b)[k,n]; op transposes or does not.
struct GemmShape {
  int64_t m, n, k;
  bool transpose_a = false, transpose_b = false;
};

// c[M,N] = alpha * op(a)[M,K] op(b)[K,N] + beta * c, row-major with row strides lda, ldb, ldc, sums in fp32. beta = 0
// overwrites c whatever it holds. The library packs pieces of the operands into memory of its own, 2 MiB at most
// however large the product is (kGemmBuffers); where it gets none, the program ends with a line that says so.
void gemm(const GemmShape& shape, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
          float* c, int64_t ldc);

// The same with bf16 operands, by the processor's instructions for them; beta is 0 or 1. Where these are not there, an
// extent is 1, or the library needs more scratch for this shape, it returns false and has done nothing. `scratch` is
// aligned to 64 bytes.
bool gemm_bf16(const GemmShape& shape, float alpha, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float beta,
               float* c, int64_t ldc, void* scratch, size_t scratch_bytes);

// Whether gemm_bf16() is faster than to widen the operands first, and a model in bf16 faster than one in fp32: yes with
// AMX and on AMD's processors with AVX512-BF16, where a core has twice its fp32 rate, no on Intel's with AVX512-BF16
// alone, where it has half (docs/performance.md). By the processor's name and instructions, so that two runs agree.
bool multiplies_bf16_faster();

// For the banner: "oneDNN 2.6.3 with AVX512-BF16".
std::string gemm_description();

// Our own product, for a build without a library; always there, so that it is tested.
void plain_gemm(const GemmShape& shape, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
                float beta, float* c, int64_t ldc);

// What the library takes for each thread: 2 MiB for packing with AVX-512, less with older instructions; twice as much
// may stay with malloc (limit_kept_memory(), library_settings.h).
inline constexpr size_t kGemmBuffers = size_t{5} << 20;

// Scratch that a matmul with a bf16 operand or result needs on each thread: fixed, whatever the matrices' size.
inline constexpr int64_t kTileRows = 512, kTileCols = 1024, kTileDepth = 384;
inline constexpr int64_t kMatmulScratchFloats = kTileRows * kTileCols + kTileRows * kTileDepth + kTileDepth * kTileCols;
