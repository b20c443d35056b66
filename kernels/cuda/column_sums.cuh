// column_sums.cuh: how sums over the rows of a matrix are cut: chunks of rows, one partial sum of every column per
// chunk, and a second kernel that adds the partials in order. The number of chunks depends on the number of rows alone,
// so a sum is the same on every device.
#pragma once

#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/views.cuh"

struct RowChunks {
  int64_t rows = 0;   // in a chunk; the last one may have fewer
  int64_t count = 0;  // at most the limit
};

inline RowChunks row_chunks(int64_t rows, int64_t limit, int64_t smallest) {
  const int64_t even = (rows + limit - 1) / limit;
  const int64_t chunk = std::max(smallest, (even + smallest - 1) / smallest * smallest);
  return {chunk, (rows + chunk - 1) / chunk};
}

// Output k of one or two, C columns each: output[j] (+)= sum over the chunks of partials[chunk, k, j], rounded once.
void add_column_partials(const char* name, cudaStream_t stream, const Tensor& first, const Tensor& second,
                         const float* partials, int64_t chunks, bool accumulate);
