// column_sums.cuh: how sums over the rows of a matrix are cut: chunks of rows, one partial sum of every column per
// chunk, and a second kernel that adds the partials in order. The number of chunks depends on the number of rows alone,
// so a sum is the same on every device. What is summed may be made on the way (gelu.cu).
#pragma once

#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/views.cuh"
#include "kernels/cuda_workspace.h"

inline constexpr int kColumnWarps = 8, kColumnUnroll = 4;
inline constexpr int kColumnStep = kColumnWarps * kColumnUnroll;  // rows a block has under way
inline constexpr int kColumnTile = kWarp * kOctet;

struct RowChunks {
  int64_t rows = 0;   // in a chunk; the last one may have fewer
  int64_t count = 0;  // at most the limit
};

inline RowChunks row_chunks(int64_t rows, int64_t limit, int64_t smallest) {
  const int64_t even = (rows + limit - 1) / limit;
  const int64_t chunk = std::max(smallest, (even + smallest - 1) / smallest * smallest);
  return {chunk, (rows + chunk - 1) / chunk};
}

// Of a matrix of partial sums: the next columns, as many as `out` has, in its first `chunks` rows.
struct PartialColumns {
  Tensor out;
  int64_t chunks = 0;
};

// out[j] (+)= the sum over its chunks of the partial sums of column j, rounded once. `second` may have no tensor.
void add_column_partials(const char* name, cudaStream_t stream, const PartialColumns& first,
                         const PartialColumns& second, const float* partials, bool accumulate);

// partials[chunk, column] = sum of a chunk's rows. Block (x, y): columns from x * kColumnTile on, chunk y. The numbers
// are those of `source`: what it loads, raw, it makes into an octet of them, and may store that, too.
template <typename Source>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    column_sums_kernel(float* partials, Source source, int64_t rows, int64_t cols, int64_t chunk) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kColumnTile, column = tile + lane * kOctet;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  float sums[kOctet] = {};
  for (int64_t row = begin + warp; row < end && column < cols; row += kColumnStep) {
    typename Source::Raw raw[kColumnUnroll];
#pragma unroll
    for (int u = 0; u < kColumnUnroll; ++u) {
      if (row + u * kColumnWarps < end) raw[u] = source.load(row + u * kColumnWarps, column);
    }
#pragma unroll
    for (int u = 0; u < kColumnUnroll; ++u) {
      if (row + u * kColumnWarps >= end) continue;
      float values[kOctet];
      source.numbers(raw[u], row + u * kColumnWarps, column, values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sums[i] += values[i];
    }
  }
  float* const shared = shared_memory<float>();  // [kColumnWarps, kColumnTile]
#pragma unroll
  for (int i = 0; i < kOctet; ++i) shared[warp * kColumnTile + lane * kOctet + i] = sums[i];
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < kColumnTile && tile + j < cols; j += kColumnWarps * kWarp) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) sum += shared[w * kColumnTile + j];
    partials[blockIdx.y * cols + tile + j] = sum;
  }
}

// dbias[j] (+)= the sums of the columns of what `source` makes, [rows, dbias.elements()]; `partials` holds
// kMaxBiasChunks rows of as many floats.
template <typename Source>
void sum_columns(const char* name, cudaStream_t stream, const Tensor& dbias, const Source& source, int64_t rows,
                 float* partials, bool accumulate) {
  const int64_t cols = dbias.elements();
  const RowChunks chunks = row_chunks(rows, kMaxBiasChunks, kColumnStep);
  if (rows > 0) {
    launch(name, column_sums_kernel<Source>,
           {.grid = dim3(static_cast<unsigned>((cols + kColumnTile - 1) / kColumnTile),
                         static_cast<unsigned>(chunks.count)),
            .block = dim3(kColumnWarps * kWarp),
            .shared_bytes = kColumnWarps * kColumnTile * sizeof(float),
            .stream = stream},
           partials, source, rows, cols, chunks.rows);
  }
  add_column_partials("column_partials", stream, {dbias, chunks.count}, {}, partials, accumulate);
}
