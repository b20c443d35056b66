// plain_gemm.cpp: matrix products without a library. Compute-bound: 2 m n k operations, in tile_product() on pieces of
// op(A) and op(B) that are packed for the caches: kPackedDepth x kPanel of op(B), strip by strip, the last one padded
// with zeros, and kPackedRows x kPackedDepth of op(A).
#include <algorithm>
#include <vector>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/tile_product.h"

namespace {

constexpr int64_t kPackedRows = 48, kStrip = 64, kPanel = 1024, kPackedDepth = 256;

// Element (i, j) of op(X) is x[i * rows + j * cols].
struct Strides {
  int64_t rows, cols;
  int64_t at(int64_t i, int64_t j) const { return i * rows + j * cols; }
};

// out[rows, width] = x[rows, cols], zeros behind them.
void pack(float* out, int64_t width, const float* x, Strides s, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i, x += s.rows, out += width) {
    if (s.cols == 1) {
      std::copy(x, x + cols, out);
    } else {
      for (int64_t j = 0; j < cols; ++j) out[j] = x[j * s.cols];
    }
    std::fill(out + cols, out + width, 0.0f);
  }
}

void scale(float* c, int64_t stride, int64_t m, int64_t n, float beta) {
  if (beta == 1.0f) return;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) c[i * stride + j] = beta == 0.0f ? 0.0f : beta * c[i * stride + j];
}

// C += alpha op(A) op(B), row-major C.
void multiply(int64_t m, int64_t n, int64_t k, float alpha, const float* a, Strides sa, const float* b, Strides sb,
              float* c, int64_t ldc) {
  static thread_local std::vector<float> packed_a(kPackedRows * kPackedDepth), packed_b(kPackedDepth * kPanel);
  static thread_local std::vector<float> tile(kPackedRows * kStrip);
  for (int64_t p = 0; p < k; p += kPackedDepth) {
    const int64_t depth = std::min(kPackedDepth, k - p);
    for (int64_t panel = 0; panel < n; panel += kPanel) {
      const int64_t columns = std::min(kPanel, n - panel);
      for (int64_t j = 0; j < columns; j += kStrip)
        pack(&packed_b[static_cast<size_t>(j * kPackedDepth)], kStrip, b + sb.at(p, panel + j), sb, depth,
             std::min(kStrip, columns - j));
      for (int64_t i = 0; i < m; i += kPackedRows) {
        const int64_t rows = std::min(kPackedRows, m - i);
        pack(packed_a.data(), depth, a + sa.at(i, p), sa, rows, depth);
        for (int64_t j = 0; j < columns; j += kStrip) {
          const int64_t used = std::min(kStrip, columns - j);
          tile_product(rows, divide_up(used, 16) * 16, depth, {packed_a.data(), depth, 1},
                       &packed_b[static_cast<size_t>(j * kPackedDepth)], kStrip, tile.data(), kStrip, false);
          for (int64_t row = 0; row < rows; ++row) {
            float* const to = c + (i + row) * ldc + panel + j;
            const float* const from = &tile[static_cast<size_t>(row * kStrip)];
            for (int64_t col = 0; col < used; ++col) to[col] += alpha * from[col];
          }
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
