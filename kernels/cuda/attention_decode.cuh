// attention_decode.cuh: attention of a sequence's last query, with the projections of all tokens in memory.
// Memory-bound: one read of all keys and values.
//
// A block owns a head and walks over pieces of kDecodeThreads keys. First each thread has a key and computes its score;
// then the threads are groups of as many as make the head's channels, and group g of G adds the values of keys g, g +
// G, g + 2G, ... Sums are kept relative to the largest score so far.
#pragma once

#include <cmath>

#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/views.cuh"

inline constexpr int kDecodeThreads = 256;
inline constexpr int kMostDecodeChannels = kDecodeThreads;  // of a head
// The query, the scores of a piece (at the end: the groups' sums), and room for sums over the block.
inline constexpr size_t kDecodeBytes = sizeof(float) * (kMostDecodeChannels + kDecodeThreads + kDecodeThreads / kWarp);

// kOctets: heads of whole octets, whose keys are read 8 channels at a time. `lanes`: threads of a group, a power of 2.
template <typename T, bool kOctets>
__global__ __launch_bounds__(kDecodeThreads) void attention_decode_kernel(AnyView out, const T* qkv,
                                                                          AttentionSizes sizes, int lanes) {
  float* const query = shared_memory<float>();
  float* const weights = query + kMostDecodeChannels;
  float* const reduction = weights + kDecodeThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, group = thread / lanes;
  const int groups = kDecodeThreads / lanes;
  const int first_channel = static_cast<int>(blockIdx.x) * sizes.head_dim;
  const int64_t stride = 3 * static_cast<int64_t>(sizes.channels);
  const T* const keys = qkv + sizes.channels + first_channel;
  const T* const values = keys + sizes.channels;
  if (thread < sizes.head_dim) {
    const T* const last = qkv + (sizes.sequence - 1) * stride + first_channel;
    query[thread] = to_float(last[thread]) * sizes.scale;
  }
  __syncthreads();

  float largest = -INFINITY, total = 0, sum = 0;  // `sum`: of this thread's channel
  for (int first = 0; first < sizes.sequence; first += kDecodeThreads) {
    const int count = sizes.sequence - first < kDecodeThreads ? sizes.sequence - first : kDecodeThreads;
    float score = -INFINITY;
    if (thread < count) {
      const T* const key = keys + (first + thread) * stride;
      score = 0;
      if constexpr (kOctets) {
        for (int j = 0; j < sizes.head_dim; j += kOctet) {
          float channels[kOctet];
          unpack(load_vector<kOctet>(key + j), channels);
#pragma unroll
          for (int i = 0; i < kOctet; ++i) score = fmaf(query[j + i], channels[i], score);
        }
      } else {
        for (int j = 0; j < sizes.head_dim; ++j) score = fmaf(query[j], to_float(key[j]), score);
      }
    }
    const float before = largest;
    largest = fmaxf(largest, block_max(score, reduction));
    const float weight = thread < count ? expf(score - largest) : 0.0f, shrink = expf(before - largest);
    weights[thread] = weight;
    total = total * shrink + block_sum(weight, reduction);  // with barriers: all weights are there
    sum *= shrink;
    if (lane < sizes.head_dim) {
      for (int k = group; k < count; k += groups) {
        sum = fmaf(weights[k], to_float(values[(first + k) * stride + lane]), sum);
      }
    }
  }

  __syncthreads();  // the last weights have been used
  weights[thread] = sum;
  __syncthreads();
  if (thread < sizes.head_dim) {
    for (int other = 1; other < groups; ++other) sum += weights[other * lanes + thread];
    out.store_one(0, first_channel + thread, sum / total);
  }
}
