// row_sums.h: sums over the rows of a matrix, of numbers that may be made just before they are summed.
#pragma once

#include "kernels/cpu/parallel.h"

inline int64_t row_chunks(int64_t rows) { return divide_up(rows, row_chunk(rows)); }

// fp32 numbers of scratch for sum_rows().
inline int64_t row_sum_partials(const Tensor& rows) { return row_chunks(rows.rows()) * rows.cols(); }

// sums[j] (+)= sum_i rows[i, j]; before_row(i, row i) runs shortly before row i is read. Chunks of rows are summed into
// partials of their own, four rows per pass over the partial.
template <typename F>
void sum_rows(int threads, const Tensor& sums, const Tensor& rows, bool accumulate, float* partials, F&& before_row) {
  const int64_t count = rows.rows(), cols = rows.cols(), chunk = row_chunk(count), chunks = row_chunks(count);
  dispatch(sums.dtype, rows.dtype, [&]<typename Sum, typename T>() {
    parallel_blocks(threads, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        float* const partial = partials + part * cols;
        std::fill_n(partial, cols, 0.0f);
        const int64_t end = std::min(count, (part + 1) * chunk);
        int64_t row = part * chunk;
        for (; row + 4 <= end; row += 4) {
          for (int64_t i = row; i < row + 4; ++i) before_row(i, element<T>(rows, i));
          const T *a = element<const T>(rows, row), *b = element<const T>(rows, row + 1);
          const T *c = element<const T>(rows, row + 2), *d = element<const T>(rows, row + 3);
#pragma omp simd
          for (int64_t j = 0; j < cols; ++j) {
            partial[j] += (to_float(a[j]) + to_float(b[j])) + (to_float(c[j]) + to_float(d[j]));
          }
        }
        for (; row < end; ++row) {
          before_row(row, element<T>(rows, row));
          const T* a = element<const T>(rows, row);
#pragma omp simd
          for (int64_t j = 0; j < cols; ++j) partial[j] += to_float(a[j]);
        }
      }
    });
    add_partials(threads, sums.as<Sum>(), partials, chunks, cols, cols, accumulate);
  });
}
