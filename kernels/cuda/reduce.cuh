// reduce.cuh: sums and maxima over a warp and over a block, always in the same order. Cost: 5 shuffles a warp; a block
// adds two barriers and one number of shared memory per warp.
#pragma once

#include "kernels/cuda/ptx.cuh"

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Sums over a warp of kCount numbers a lane at once, each in the order of warp_sum(): afterwards lane l has the sum of
// sums[l / (32 / kCount)]. Two numbers change places instead of one being copied, so that eight sums cost 9 shuffles
// instead of 40.
template <int kCount>
__device__ inline float warp_sums(float (&sums)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int offset = kWarp / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? sums[i + half] : sums[i], given = upper ? sums[i] : sums[i + half];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, given, offset);
    }
    offset /= 2;
  }
  float sum = sums[0];
#pragma unroll
  for (int rest = kWarp / 2 / kCount; rest > 0; rest /= 2) sum += __shfl_xor_sync(kAllLanes, sum, rest);
  return sum;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// The sum over all threads of a one-dimensional block whose size is a multiple of 32, returned to every thread.
// `shared`: room for blockDim.x / 32 values, free for other uses after the next barrier.
template <typename T>
__device__ inline T block_sum(T value, T* shared) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_sum(value);
  __syncthreads();  // the last use of `shared` is over
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = shared[0];
  for (int i = 1; i < warps; ++i) total += shared[i];
  return total;
}

__device__ inline float block_max(float value, float* shared) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float largest = shared[0];
  for (int i = 1; i < warps; ++i) largest = fmaxf(largest, shared[i]);
  return largest;
}
