// matmul_row.cpp: matrix products with one row, which is all that a sample of text asks for. Memory-bound: b is read
// once, where it is and in its own dtype, row after row. (A library's sgemv would need a bf16 matrix widened first.)
#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/dispatch.h"

namespace {

constexpr int64_t kColumns = 4096, kDepth = 1024;  // of b at a time; sums and the piece of a are on the stack
constexpr double kWorthThreads = 1e5;              // operations

constexpr int64_t kStretch = 256;  // numbers that are asked for at a time

// sums[j] += sum over k of a[k] * b[k, j].
template <typename B>
void add_rows(float* sums, const float* a, const B* b, int64_t stride, int64_t depth, int64_t columns) {
  const int64_t ahead = rows_ahead<B>(columns) * stride;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t begin = 0; begin < columns; begin += kStretch) {
      const int64_t end = std::min(columns, begin + kStretch);
      const B* const row = b + k * stride;
      prefetch(row + ahead + begin, end - begin);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) sums[j] += a[k] * to_float(row[j]);
    }
  }
}

// sums[j] += sum over k of a[k] * b[j, k].
template <typename B>
void add_dots(float* sums, const float* a, const B* b, int64_t stride, int64_t depth, int64_t columns) {
  const int64_t ahead = rows_ahead<B>(depth) * stride, half = depth / 2;
  for (int64_t j = 0; j < columns; ++j) {
    const B *const row = b + j * stride, *const second = row + half;
    prefetch(row + ahead, depth);
    float dot0 = 0, dot1 = 0;
#pragma omp simd reduction(+ : dot0, dot1)
    for (int64_t k = 0; k < half; ++k) {
      dot0 += a[k] * to_float(row[k]);
      dot1 += a[half + k] * to_float(second[k]);
    }
    if (depth % 2 != 0) dot0 += a[depth - 1] * to_float(row[depth - 1]);
    sums[j] += dot0 + dot1;
  }
}

// to[i] (+)= factor * from[i * stride]
void load(float* to, const Tensor& from, int64_t begin, int64_t stride, int64_t count, float factor, bool add) {
  dispatch(from.dtype, [&]<typename T>() {
    const T* const values = from.as<const T>() + begin * stride;
    for (int64_t i = 0; i < count; ++i) to[i] = (add ? to[i] : 0.0f) + factor * to_float(values[i * stride]);
  });
}

}  // namespace

void matmul_row(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options, int threads) {
  const int64_t n = out.cols(), depth = options.transpose_a ? a.rows() : a.cols(), stride = b.leading_dimension();
  const int64_t a_stride = options.transpose_a ? a.leading_dimension() : 1;
  if (2.0 * static_cast<double>(n * depth) < kWorthThreads) threads = 1;
  const int64_t block = std::min(kColumns, divide_up(divide_up(n, threads), 16) * 16);
  parallel_blocks(threads, n, block, [&](int64_t begin, int64_t end) {
    float sums[kColumns] = {}, piece[kDepth];
    const int64_t columns = end - begin;
    if (options.accumulate) load(sums, out, begin, 1, columns, 1.0f, false);
    if (options.bias) load(sums, options.bias, begin, 1, columns, 1.0f, true);
    dispatch(b.dtype, [&]<typename B>() {
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t steps = std::min(kDepth, depth - k);
        load(piece, a, k, a_stride, steps, options.alpha, false);
        if (options.transpose_b) {
          add_dots(sums, piece, element<const B>(b, begin, k), stride, steps, columns);
        } else {
          add_rows(sums, piece, element<const B>(b, k, begin), stride, steps, columns);
        }
      }
    });
    dispatch(out.dtype, [&]<typename Out>() {
      Out* const row = out.as<Out>() + begin;
      for (int64_t j = 0; j < columns; ++j) row[j] = from_float<Out>(sums[j]);
    });
  });
}
