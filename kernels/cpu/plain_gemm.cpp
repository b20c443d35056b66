// plain_gemm.cpp: matrix products without a library. Compute-bound: 2 m n k operations, each number of C in registers
// while kDepth steps of A and B stream through the first-level cache.
//
// It packs kDepth x kPanelCols of op(B) and kDepth x kRows of op(A), so that the innermost loop reads both one
// after another, and keeps a tile of kRows x kCols of C in 16 vector registers of 16 floats' worth (GCC splits
// the vectors where the machine's are shorter). Edges are padded with zeros while packing.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/gemm.h"

namespace {

constexpr int64_t kRows = 8, kVector = 16, kVectors = 2, kCols = kVector * kVectors;
constexpr int64_t kDepth = 256, kPanelCols = 1024;

typedef float Vector __attribute__((vector_size(kVector * sizeof(float)), aligned(4), may_alias));

// acc[kRows, kCols] = a[depth, kRows]^T b[depth, kCols], both packed.
void multiply_tile(float* acc, const float* a, const float* b, int64_t depth) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p, a += kRows, b += kCols) {
    Vector right[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + v * kVector);
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t v = 0; v < kVectors; ++v) sums[i][v] += a[i] * right[v];
  }
  std::memcpy(acc, sums, sizeof sums);
}

// Element (i, j) of op(X) is x[i * rows + j * cols].
struct Strides {
  int64_t rows, cols;
  int64_t at(int64_t i, int64_t j) const { return i * rows + j * cols; }
};

// out[depth, width]: columns [0, used) of a piece of op(B) (or rows of op(A)), zeros behind them.
void pack(float* out, const float* x, int64_t along_depth, int64_t across, int64_t depth, int64_t used, int64_t width) {
  for (int64_t p = 0; p < depth; ++p) {
    const float* from = x + p * along_depth;
    float* to = out + p * width;
    if (across == 1) {
      std::copy(from, from + used, to);
    } else {
      for (int64_t j = 0; j < used; ++j) to[j] = from[j * across];
    }
    std::fill(to + used, to + width, 0.0f);
  }
}

void scale(float* c, int64_t stride, int64_t m, int64_t n, float beta) {
  if (beta == 1.0f) return;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) c[i * stride + j] = beta == 0.0f ? 0.0f : beta * c[i * stride + j];
}

void add_tile(float* c, int64_t stride, const float* acc, int64_t rows, int64_t cols, float alpha) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) c[i * stride + j] += alpha * acc[i * kCols + j];
}

// C += alpha op(A) op(B), row-major C.
void multiply(int64_t m, int64_t n, int64_t k, float alpha, const float* a, Strides sa, const float* b, Strides sb,
              float* c, int64_t ldc) {
  static thread_local std::vector<float> packed_a(kDepth * kRows), packed_b(kDepth * kPanelCols);
  float acc[kRows * kCols];
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = std::min(kDepth, k - p);
    for (int64_t panel = 0; panel < n; panel += kPanelCols) {
      const int64_t panel_cols = std::min(kPanelCols, n - panel);
      for (int64_t j = 0; j < panel_cols; j += kCols)
        pack(&packed_b[static_cast<size_t>(j) * kDepth], b + sb.at(p, panel + j), sb.rows, sb.cols, depth,
             std::min(kCols, panel_cols - j), kCols);
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t rows = std::min(kRows, m - i);
        pack(packed_a.data(), a + sa.at(i, p), sa.cols, sa.rows, depth, rows, kRows);
        for (int64_t j = 0; j < panel_cols; j += kCols) {
          multiply_tile(acc, packed_a.data(), &packed_b[static_cast<size_t>(j) * kDepth], depth);
          add_tile(c + i * ldc + panel + j, ldc, acc, rows, std::min(kCols, panel_cols - j), alpha);
        }
      }
    }
  }
}

}  // namespace

void plain_gemm(const GemmShape& shape, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
                float beta, float* c, int64_t ldc) {
  const Strides sa = shape.transpose_a ? Strides{1, lda} : Strides{lda, 1};
  const Strides sb = shape.transpose_b ? Strides{1, ldb} : Strides{ldb, 1};
  scale(c, ldc, shape.m, shape.n, beta);
  multiply(shape.m, shape.n, shape.k, alpha, a, sa, b, sb, c, ldc);
}
