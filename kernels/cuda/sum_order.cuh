// sum_order.cuh: in which order the elements of a tensor are added, whoever adds them. It depends on the tensor's shape
// alone: `blocks` partial sums, each of every blocks-th tile; in a tile a thread takes kSumUnroll vectors, fp32 sums
// over kSumRun tiles join a double, and the threads' doubles are added as block_sum() does. An operation that has the
// numbers in registers anyway can so leave the bits that a pass of its own would.
#pragma once

#include <algorithm>

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/views.cuh"
#include "kernels/cuda_workspace.h"

inline constexpr int kSumThreads = 256, kSumUnroll = 4, kSumTile = kSumThreads * kSumUnroll;
inline constexpr int kSumRun = 16;  // rounds of loads that are added in fp32 before they join a double
inline constexpr size_t kSumShared = (kSumThreads / kWarp + 1) * sizeof(double);

// One tensor of a sum.
struct SumPart {
  void* data = nullptr;
  int64_t pitch = 0;
  Extent extent;
  int64_t tiles = 0;
  int blocks = 0;  // partial sums

  template <typename T>
  __device__ VectorView<T, Pack<T>::kSize> view() const {
    return {static_cast<T*>(data), pitch};
  }
};

// Of a contiguous tensor of fp32 or bf16.
HOST_DEVICE inline SumPart sum_part(void* data, DType dtype, int64_t elements) {
  const Extent extent = {1, elements};
  const int64_t tiles = extent.row_tiles(dtype == DType::kBF16 ? 8 : 4, kSumTile);
  return {data, 0, extent, tiles, static_cast<int>(tiles < 1 ? 1 : tiles < kMaxSumBlocks ? tiles : kMaxSumBlocks)};
}

inline SumPart sum_part(const Tensor& x) {
  const Extent extent = common_extent(x);
  const int64_t tiles = extent.tiles(static_cast<int>(16 / dtype_size(x.dtype)), kSumTile);
  return {x.data, x.leading_dimension(), extent, tiles, static_cast<int>(std::clamp<int64_t>(tiles, 1, kMaxSumBlocks))};
}

// Partial sum number `block`, in all threads. By kSumThreads threads; `shared` as for block_sum().
template <bool kSquare, typename T>
__device__ inline double partial_sum(const SumPart& part, int block, double* shared) {
  constexpr int kWidth = Pack<T>::kSize;
  const auto x = part.view<T>();
  const int64_t row_groups = part.extent.cols / kWidth;
  double total = 0;
  float sums[kWidth] = {};
  int rounds = 0;
  for (int64_t index = block; index < part.tiles; index += part.blocks) {
    const Tile tile = tile_of<kWidth, kSumTile>(part.extent, index);
    const int64_t first = tile.first + threadIdx.x;
    Vector<T, kWidth> raw[kSumUnroll];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int64_t group = first + u * kSumThreads;
      if (group < row_groups) raw[u] = x.load_again(tile.row, group * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      if (first + u * kSumThreads >= row_groups) continue;
      float values[kWidth];
      unpack(raw[u], values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] = kSquare ? fmaf(values[i], values[i], sums[i]) : sums[i] + values[i];
    }
    if (++rounds % kSumRun == 0) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        total += static_cast<double>(sums[i]);
        sums[i] = 0;
      }
    }
  }
  for (int i = 0; i < kWidth; ++i) total += static_cast<double>(sums[i]);
  const int64_t tail = row_groups * kWidth + threadIdx.x;  // past the last whole vector
  if (block == 0 && part.extent.rows == 1 && tail < part.extent.cols) {
    const double value = static_cast<double>(x.load_one(0, tail));
    total += kSquare ? value * value : value;
  }
  return block_sum(total, shared);
}

// All partial sums of a tensor together, in all threads, of which there are kSumThreads or half as many: those then do
// the work of two each.
template <int kThreads = kSumThreads>
__device__ inline double add_partial_sums(const double* partials, int count, double* shared) {
  constexpr int kOfThread = kSumThreads / kThreads;
  static_assert(kOfThread <= 2);
  double totals[kOfThread] = {};
#pragma unroll
  for (int k = 0; k < kOfThread; ++k) {
    for (int i = static_cast<int>(threadIdx.x) + k * kThreads; i < count; i += kSumThreads) totals[k] += partials[i];
    totals[k] = warp_sum(totals[k]);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kOfThread; ++k)
    if (threadIdx.x % kWarp == 0) shared[(threadIdx.x + k * kThreads) / kWarp] = totals[k];
  __syncthreads();
  double total = shared[0];
  for (int i = 1; i < kSumThreads / kWarp; ++i) total += shared[i];
  return total;
}

// The sum as an operation leaves it.
__device__ inline void store_sum(float* out, double sum, bool accumulate) {
  *out = static_cast<float>(sum + (accumulate ? static_cast<double>(*out) : 0.0));
}

// Squares of what a kernel writes, octet by octet, in the order above: of a contiguous tensor of whole octets. An octet
// is a vector of bf16, or two neighbouring ones of fp32, so that a thread of these does what one or two threads do
// there.
template <typename T>
struct OctetSquares {
  static constexpr int kVectors = kOctet / Pack<T>::kSize;  // of an octet
  static constexpr int kThreads = kSumThreads / kVectors;

  // The octets of the tensor that this thread has in tile `index`, u = 0 .. kSumUnroll - 1.
  __device__ static int64_t octet(int64_t index, int u) {
    return (index * kSumUnroll + u) * kThreads + static_cast<int64_t>(threadIdx.x);
  }

  __device__ void add(const float (&x)[kOctet]) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sums_[i] = fmaf(x[i], x[i], sums_[i]);
  }

  // After each tile.
  __device__ void end_tile() {
    if (++rounds_ % kSumRun == 0) join();
  }

  // The partial sum, in all threads.
  __device__ double total(double* shared) {
    join();
    if constexpr (kVectors == 1) {
      return block_sum(totals_[0], shared);
    } else {
      // Half of a warp here is a warp there, whose odd lanes are this thread's second vectors.
#pragma unroll
      for (int offset = kWarp / 4; offset > 0; offset /= 2) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) totals_[v] += __shfl_xor_sync(kAllLanes, totals_[v], offset);
      }
      constexpr int kHalf = kWarp / kVectors;
      __syncthreads();
      if (threadIdx.x % kHalf == 0) shared[threadIdx.x / kHalf] = totals_[0] + totals_[1];
      __syncthreads();
      double all = shared[0];
      for (int i = 1; i < kSumThreads / kWarp; ++i) all += shared[i];
      return all;
    }
  }

 private:
  __device__ void join() {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      totals_[i / Pack<T>::kSize] += static_cast<double>(sums_[i]);
      sums_[i] = 0;
    }
  }

  float sums_[kOctet] = {};
  double totals_[kVectors] = {};
  int rounds_ = 0;
};
