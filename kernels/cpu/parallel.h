// parallel.h: loops cut into blocks of a fixed size, one thread to a block. What a block computes does not depend on
// the number of threads, so neither do sums that keep one partial result per block and add them in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "kernels/dispatch.h"
#include "kernels/tensor.h"

// Elements that are worth a thread's while: 64 KiB of fp32, a few microseconds.
inline constexpr int64_t kSpan = 16384;

// f(begin, end) for consecutive blocks of [0, count). f must not throw.
template <typename F>
void parallel_blocks(int threads, int64_t count, int64_t block, F&& f) {
  const int64_t blocks = (count + block - 1) / block;
  if (blocks == 1) {
    f(int64_t{0}, count);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < blocks; ++i) f(i * block, std::min(count, (i + 1) * block));
}

// Rows of `cols` elements that make up about one span.
inline int64_t rows_per_span(int64_t cols) { return std::max<int64_t>(1, kSpan / std::max<int64_t>(cols, 1)); }

// Runs f(row, column, count) over tensors of one shape, in pieces of about one span: contiguous tensors as one long row
// 0, strided ones row by row. f must not throw.
template <typename F>
void parallel_spans(int threads, std::initializer_list<Tensor> tensors, F&& f) {
  const Tensor& first = *tensors.begin();
  bool contiguous = true;
  for (const Tensor& t : tensors) {
    require(t.elements() == first.elements(), "elementwise: sizes differ");
    require(has_uniform_rows(t), "elementwise: rows of a view must have one stride");
    contiguous = contiguous && t.contiguous();
  }
  if (contiguous) {
    parallel_blocks(threads, first.elements(), kSpan, [&](int64_t begin, int64_t end) { f(0, begin, end - begin); });
    return;
  }
  for (const Tensor& t : tensors) require(t.cols() == first.cols(), "elementwise: rows differ in length");
  const int64_t cols = first.cols();
  parallel_blocks(threads, first.rows(), rows_per_span(cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row, 0, cols);
  });
}

// A sum that is one number is made of at most so many partial ones, added in order.
inline constexpr int64_t kMaxSumChunks = 1024;

// Sums over rows are cut into at most kMaxRowChunks chunks whose size depends on the number of rows alone. Each chunk
// adds its rows into a partial of its own, and add_partials() adds the partials in order.
inline constexpr int64_t kMaxRowChunks = 64;

inline int64_t row_chunk(int64_t rows) { return std::max<int64_t>(16, (rows + kMaxRowChunks - 1) / kMaxRowChunks); }

// out[j] (+)= sum over the chunks of partials[chunk * stride + j].
template <typename T>
void add_partials(int threads, T* out, const float* partials, int64_t chunks, int64_t stride, int64_t count,
                  bool accumulate) {
  parallel_blocks(threads, count, 256, [&](int64_t begin, int64_t end) {
    float sums[256] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* partial = partials + chunk * stride + begin;
      for (int64_t j = 0; j < end - begin; ++j) sums[j] += partial[j];
    }
    for (int64_t j = begin; j < end; ++j) {
      out[j] = from_float<T>(sums[j - begin] + (accumulate ? to_float(out[j]) : 0.0f));
    }
  });
}
