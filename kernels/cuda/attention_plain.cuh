// attention_plain.cuh: causal flash attention in fp32 arithmetic for any head dimension up to 256 and fp32 or bf16
// tensors in any mix: what the tensor-core kernels do not take. Compute-bound: 4 HD operations forward and 14 HD
// backward (scores and dP are computed twice) for each of the T (T+1) / 2 visible pairs of a head.
//
// A block of 16 x 16 threads owns a tile of rows of one head and walks over the tiles of the other side; scores exist
// one tile at a time. Thread (y, x) computes the scores of rows y R .. y R + R-1 with the columns x, x + 16, ..., and
// of the results the same rows and every 16th group of 4 channels. With R = 4 a step of 4 channels is 8 16-byte reads
// of shared memory for 64 fused multiply-adds, which is about the ratio of the two units' speeds. Rows in shared memory
// are 4 floats longer than needed: 16-byte reads of consecutive rows then hit different banks. Tensors are widened to
// fp32 on the way into shared memory; whether they are bf16 is asked at run time, once for each element loaded, so
// there are not eight copies of every kernel.
#pragma once

#include <cmath>

#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/views.cuh"

inline constexpr int kPlainSide = 16;
inline constexpr int kPlainThreads = kPlainSide * kPlainSide;

// kDim: the head dimension rounded up to 64, 128 or 256; channels past the head's are zeros.
template <int kDim>
struct PlainTiles {
  static constexpr int kForward = kDim <= 128 ? 64 : 32;
  static constexpr int kBackward = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr size_t kForwardBytes =
      sizeof(float) * (2 * kForward * (kDim + 4) + kForward * (kForward + 4));  // Q; K, then V; P
  static constexpr size_t kBackwardBytes =
      sizeof(float) * (4 * kBackward * (kDim + 4) + kBackward * (kBackward + 4));  // Q, K, V, dO; P, then dS
  static_assert(kForwardBytes <= kLeastSharedMemory && kBackwardBytes <= kLeastSharedMemory);
};

// Rows [0, kTile) of a head into shared memory; zeros from row `rows` and channel `head_dim` on.
template <int kTile, int kDim>
__device__ inline void plain_load(float* tile, const AnyView& source, int64_t offset, int stride, int rows,
                                  int head_dim) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDim; i += kPlainThreads) {
    const int row = i / kDim, channel = i % kDim;
    tile[row * (kDim + 4) + channel] = row < rows && channel < head_dim
                                           ? source.load_one(0, offset + static_cast<int64_t>(row) * stride + channel)
                                           : 0.0f;
  }
}

// Row y R + i, channel 4 x + 64 c + e of a tile is sums[i][4 c + e] of thread (y, x).
template <int R, int kDim>
__device__ inline void plain_store(const AnyView& target, int64_t offset, int stride, int rows, int head_dim,
                                   const float (&sums)[R][kDim / kPlainSide], float factor) {
  const int y = static_cast<int>(threadIdx.x) / kPlainSide, x = static_cast<int>(threadIdx.x) % kPlainSide;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int row = y * R + i;
#pragma unroll
    for (int j = 0; j < kDim / kPlainSide; ++j) {
      const int channel = 4 * x + 64 * (j / 4) + j % 4;
      if (row < rows && channel < head_dim)
        target.store_one(0, offset + static_cast<int64_t>(row) * stride + channel, sums[i][j] * factor);
    }
  }
}

// products[i][j] = a[y R + i] . b[x + 16 j]
template <int R, int kDim>
__device__ inline void plain_dot_rows(float (&products)[R][R], const float* a, const float* b, int head_dim) {
  const int y = static_cast<int>(threadIdx.x) / kPlainSide, x = static_cast<int>(threadIdx.x) % kPlainSide;
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int j = 0; j < R; ++j) products[i][j] = 0;
  }
  for (int channel = 0; channel < head_dim; channel += 4) {
    Pack<float> a_rows[R], b_rows[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      a_rows[i] = load128(a + (y * R + i) * (kDim + 4) + channel);
      b_rows[i] = load128(b + (x + kPlainSide * i) * (kDim + 4) + channel);
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) products[i][j] = fmaf(a_rows[i].v[e], b_rows[j].v[e], products[i][j]);
      }
    }
  }
}

// weights[y R + i][x + 16 j] = values[i][j], in rows of kTile + 4.
template <int R>
__device__ inline void plain_store_weights(float* weights, const float (&values)[R][R]) {
  const int y = static_cast<int>(threadIdx.x) / kPlainSide, x = static_cast<int>(threadIdx.x) % kPlainSide;
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int j = 0; j < R; ++j) weights[(y * R + i) * (R * kPlainSide + 4) + x + kPlainSide * j] = values[i][j];
  }
}

// sums[row] += sum over k of weights[row][k] rows[k], each thread for its rows and channels.
template <int R, int kDim>
__device__ inline void plain_add_weighted_rows(float (&sums)[R][kDim / kPlainSide], const float* weights,
                                               const float* rows) {
  constexpr int kTile = R * kPlainSide;
  const int y = static_cast<int>(threadIdx.x) / kPlainSide, x = static_cast<int>(threadIdx.x) % kPlainSide;
  for (int first = 0; first < kTile; first += 4) {
    Pack<float> weight[R];
#pragma unroll
    for (int i = 0; i < R; ++i) weight[i] = load128(weights + (y * R + i) * (kTile + 4) + first);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int c = 0; c < kDim / 64; ++c) {
        const Pack<float> row = load128(rows + (first + k) * (kDim + 4) + 64 * c + 4 * x);
#pragma unroll
        for (int i = 0; i < R; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][4 * c + e] = fmaf(weight[i].v[k], row.v[e], sums[i][4 * c + e]);
        }
      }
    }
  }
}

// Over the 16 threads that share rows: half a warp.
__device__ inline float plain_row_sum(float value) {
#pragma unroll
  for (int offset = kPlainSide / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

__device__ inline float plain_row_max(float value) {
#pragma unroll
  for (int offset = kPlainSide / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

template <int kDim>
__global__ __launch_bounds__(kPlainThreads, 2) void attention_forward_plain_kernel(AnyView out, float* lse, AnyView qkv,
                                                                                   AttentionSizes sizes) {
  constexpr int kTile = PlainTiles<kDim>::kForward, R = kTile / kPlainSide;
  const AttentionTile at =
      attention_tile(sizes, static_cast<int>(blockIdx.x), attention_tiles(sizes.sequence, kTile), true);
  const int y = static_cast<int>(threadIdx.x) / kPlainSide, x = static_cast<int>(threadIdx.x) % kPlainSide;
  const int stride = 3 * sizes.channels;
  const int first_query = at.tile * kTile;
  float* const queries = shared_memory<float>();
  float* const keys_or_values = queries + kTile * (kDim + 4);
  float* const weights = keys_or_values + kTile * (kDim + 4);
  plain_load<kTile, kDim>(queries, qkv, at.packed(sizes, first_query), stride, sizes.sequence - first_query,
                          sizes.head_dim);

  float sums[R][kDim / kPlainSide] = {}, maximum[R], normalizer[R];  // the normalizer: of this thread's columns only
#pragma unroll
  for (int i = 0; i < R; ++i) maximum[i] = -INFINITY, normalizer[i] = 0;
  for (int first_key = 0; first_key <= first_query; first_key += kTile) {
    const int64_t offset = at.packed(sizes, first_key) + sizes.channels;
    __syncthreads();  // the values of the last tile have been used
    plain_load<kTile, kDim>(keys_or_values, qkv, offset, stride, sizes.sequence - first_key, sizes.head_dim);
    __syncthreads();
    float scores[R][R];
    plain_dot_rows<R, kDim>(scores, queries, keys_or_values, sizes.head_dim);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      float largest = maximum[i];
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const bool visible = first_key + x + kPlainSide * j <= first_query + y * R + i;
        scores[i][j] = visible ? scores[i][j] * sizes.scale : -INFINITY;
        largest = fmaxf(largest, scores[i][j]);
      }
      largest = plain_row_max(largest);  // finite: every row sees key 0
      const float correction = expf(maximum[i] - largest);
      maximum[i] = largest;
      normalizer[i] *= correction;
#pragma unroll
      for (int j = 0; j < R; ++j) {
        scores[i][j] = expf(scores[i][j] - largest);
        normalizer[i] += scores[i][j];
      }
#pragma unroll
      for (int j = 0; j < kDim / kPlainSide; ++j) sums[i][j] *= correction;
    }
    plain_store_weights<R>(weights, scores);
    __syncthreads();  // the keys have been used
    plain_load<kTile, kDim>(keys_or_values, qkv, offset + sizes.channels, stride, sizes.sequence - first_key,
                            sizes.head_dim);
    __syncthreads();
    plain_add_weighted_rows<R, kDim>(sums, weights, keys_or_values);
  }

#pragma unroll
  for (int i = 0; i < R; ++i) {
    const float sum = plain_row_sum(normalizer[i]), inverse = 1.0f / sum;
    const int query = first_query + y * R + i;
    if (x == 0 && query < sizes.sequence) lse[at.row(sizes, query)] = maximum[i] + logf(sum);
#pragma unroll
    for (int j = 0; j < kDim / kPlainSide; ++j) sums[i][j] *= inverse;
  }
  plain_store<R, kDim>(out, at.channel(sizes, first_query), sizes.channels, sizes.sequence - first_query,
                       sizes.head_dim, sums, 1.0f);
}

// The gradients of a tile of rows, of keys (dK and dV, summed over the tiles of queries from the diagonal on) or of
// queries (dQ, over the tiles of keys up to the diagonal). `own` are the block's rows, `other` what it walks over: two
// tiles each, K and V or Q and dO. P and dS come from the products of the first ones and of the second ones.
template <int kDim, bool kOfKeys>
__global__ __launch_bounds__(kPlainThreads, 2) void attention_backward_plain_kernel(AnyView dqkv, AnyView dout,
                                                                                    const float* lse,
                                                                                    const float* delta, AnyView qkv,
                                                                                    AttentionSizes sizes) {
  constexpr int kTile = PlainTiles<kDim>::kBackward, R = kTile / kPlainSide, kTileFloats = kTile * (kDim + 4);
  const int tiles = attention_tiles(sizes.sequence, kTile);
  const AttentionTile at = attention_tile(sizes, static_cast<int>(blockIdx.x), tiles, !kOfKeys);
  const int y = static_cast<int>(threadIdx.x) / kPlainSide, x = static_cast<int>(threadIdx.x) % kPlainSide;
  const int stride = 3 * sizes.channels, first_own = at.tile * kTile, own_rows = sizes.sequence - first_own;
  float* const own = shared_memory<float>();
  float* const other = own + 2 * kTileFloats;
  float* const weights = other + 2 * kTileFloats;
  const auto load = [&](float* pair, int first, bool keys) {
    const int rows = sizes.sequence - first;
    const int64_t offset = at.packed(sizes, first) + (keys ? sizes.channels : 0);
    plain_load<kTile, kDim>(pair, qkv, offset, stride, rows, sizes.head_dim);
    if (keys) {
      plain_load<kTile, kDim>(pair + kTileFloats, qkv, offset + sizes.channels, stride, rows, sizes.head_dim);
    } else {
      plain_load<kTile, kDim>(pair + kTileFloats, dout, at.channel(sizes, first), sizes.channels, rows, sizes.head_dim);
    }
  };
  load(own, first_own, kOfKeys);

  float sums[R][kDim / kPlainSide] = {}, dvalue[R][kDim / kPlainSide] = {};  // of dK or dQ; of dV
  const int end = kOfKeys ? sizes.sequence : first_own + 1;
  for (int first = kOfKeys ? first_own : 0; first < end; first += kTile) {
    __syncthreads();  // the last tile has been used
    load(other, first, !kOfKeys);
    __syncthreads();
    float p[R][R], ds[R][R];
    plain_dot_rows<R, kDim>(p, own, other, sizes.head_dim);
    plain_dot_rows<R, kDim>(ds, own + kTileFloats, other + kTileFloats, sizes.head_dim);
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const int own_row = first_own + y * R + i, other_row = first + x + kPlainSide * j;
        const int query = kOfKeys ? other_row : own_row, key = kOfKeys ? own_row : other_row;
        const bool visible = key <= query && query < sizes.sequence;
        p[i][j] = visible ? expf(p[i][j] * sizes.scale - lse[at.row(sizes, query)]) : 0.0f;
        ds[i][j] = visible ? p[i][j] * (ds[i][j] - delta[at.row(sizes, query)]) : 0.0f;
      }
    }
    if (kOfKeys) {
      plain_store_weights<R>(weights, p);
      __syncthreads();
      plain_add_weighted_rows<R, kDim>(dvalue, weights, other + kTileFloats);
      __syncthreads();
    }
    plain_store_weights<R>(weights, ds);
    __syncthreads();
    plain_add_weighted_rows<R, kDim>(sums, weights, other);
  }

  const int64_t offset = at.packed(sizes, first_own) + (kOfKeys ? sizes.channels : 0);
  plain_store<R, kDim>(dqkv, offset, stride, own_rows, sizes.head_dim, sums, sizes.scale);
  if (kOfKeys) plain_store<R, kDim>(dqkv, offset + sizes.channels, stride, own_rows, sizes.head_dim, dvalue, 1.0f);
}
