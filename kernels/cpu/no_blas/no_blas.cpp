// no_blas.cpp: matrix products without a BLAS. Compute-bound: 2 m n k operations, each number of C in registers while
// kDepth steps of A and B stream through the first-level cache.
//
// sgemm packs kDepth x kPanelCols of op(B) and kDepth x kTileRows of op(A), so that the innermost loop reads both one
// after another, and keeps a tile of kTileRows x kTileCols of C in 24 vector registers of 16 floats' worth (GCC splits
// the vectors where the machine's are shorter). Edges are padded with zeros while packing.
#include "kernels/cpu/no_blas/cblas.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kTileRows = 8, kVector = 16, kVectors = 2, kTileCols = kVector * kVectors;
constexpr int kDepth = 256, kPanelCols = 1024;

typedef float Vector __attribute__((vector_size(kVector * sizeof(float)), aligned(4), may_alias));

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "train_gpt2: %s is not there in a build without a BLAS\n", what);
  std::abort();
}

// acc[kTileRows, kTileCols] = a[depth, kTileRows]^T b[depth, kTileCols], both packed.
void multiply_tile(float* acc, const float* a, const float* b, int depth) {
  Vector sums[kTileRows][kVectors] = {};
  for (int p = 0; p < depth; ++p, a += kTileRows, b += kTileCols) {
    Vector right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + v * kVector);
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kVectors; ++v) sums[i][v] += a[i] * right[v];
  }
  std::memcpy(acc, sums, sizeof sums);
}

// Element (i, j) of op(X) is x[i * rows + j * cols].
struct Strides {
  long rows, cols;
  long at(long i, long j) const { return i * rows + j * cols; }
};

// out[depth, width]: columns [0, used) of a piece of op(B) (or rows of op(A)), zeros behind them.
void pack(float* out, const float* x, long along_depth, long across, int depth, int used, int width) {
  for (int p = 0; p < depth; ++p) {
    const float* from = x + p * along_depth;
    float* to = out + static_cast<long>(p) * width;
    if (across == 1) {
      std::copy(from, from + used, to);
    } else {
      for (int j = 0; j < used; ++j) to[j] = from[j * across];
    }
    std::fill(to + used, to + width, 0.0f);
  }
}

void scale(float* c, long stride, int m, int n, float beta) {
  if (beta == 1.0f) return;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) c[i * stride + j] = beta == 0.0f ? 0.0f : beta * c[i * stride + j];
}

void add_tile(float* c, long stride, const float* acc, int rows, int cols, float alpha) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) c[i * stride + j] += alpha * acc[i * kTileCols + j];
}

// C += alpha op(A) op(B), row-major C.
void multiply(int m, int n, int k, float alpha, const float* a, Strides sa, const float* b, Strides sb, float* c,
              long ldc) {
  static thread_local std::vector<float> packed_a(kDepth * kTileRows), packed_b(kDepth * kPanelCols);
  float acc[kTileRows * kTileCols];
  for (int p = 0; p < k; p += kDepth) {
    const int depth = std::min(kDepth, k - p);
    for (int panel = 0; panel < n; panel += kPanelCols) {
      const int panel_cols = std::min(kPanelCols, n - panel);
      for (int j = 0; j < panel_cols; j += kTileCols)
        pack(&packed_b[static_cast<size_t>(j) * kDepth], b + sb.at(p, panel + j), sb.rows, sb.cols, depth,
             std::min(kTileCols, panel_cols - j), kTileCols);
      for (int i = 0; i < m; i += kTileRows) {
        const int rows = std::min(kTileRows, m - i);
        pack(packed_a.data(), a + sa.at(i, p), sa.cols, sa.rows, depth, rows, kTileRows);
        for (int j = 0; j < panel_cols; j += kTileCols) {
          multiply_tile(acc, packed_a.data(), &packed_b[static_cast<size_t>(j) * kDepth], depth);
          add_tile(c + i * ldc + panel + j, ldc, acc, rows, std::min(kTileCols, panel_cols - j), alpha);
        }
      }
    }
  }
}

}  // namespace

void cblas_sgemm(CBLAS_ORDER order, CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b, int m, int n, int k,
                 float alpha, const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  if (order == CblasColMajor) {  // C^T = op(B)^T op(A)^T
    cblas_sgemm(CblasRowMajor, transpose_b, transpose_a, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
    return;
  }
  const Strides sa = transpose_a == CblasTrans ? Strides{1, lda} : Strides{lda, 1};
  const Strides sb = transpose_b == CblasTrans ? Strides{1, ldb} : Strides{ldb, 1};
  scale(c, ldc, m, n, beta);
  multiply(m, n, k, alpha, a, sa, b, sb, c, ldc);
}

void cblas_sgemv(CBLAS_ORDER order, CBLAS_TRANSPOSE transpose, int m, int n, float alpha, const float* a, int lda,
                 const float* x, int incx, float beta, float* y, int incy) {
  require(order == CblasRowMajor, "a column-major matrix times a vector");
  const long stride = lda, sx = incx, sy = incy;
  const int outputs = transpose == CblasTrans ? n : m;
  for (int j = 0; j < outputs; ++j) y[j * sy] = beta == 0.0f ? 0.0f : beta * y[j * sy];
  for (int i = 0; i < m; ++i) {
    const float* row = a + i * stride;
    if (transpose == CblasTrans) {
      const float factor = alpha * x[i * sx];
      for (int j = 0; j < n; ++j) y[j * sy] += factor * row[j];
    } else {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < n; ++j) sum += row[j] * x[j * sx];
      y[i * sy] += alpha * sum;
    }
  }
}
