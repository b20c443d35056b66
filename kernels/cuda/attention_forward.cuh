// attention_forward.cuh: causal flash attention on the tensor cores, bf16, forward. Compute-bound: 4 HD operations for
// each visible pair of a query and a key.
//
// A block of 4 warps owns 128 queries of a head and walks over tiles of keys and values, which cp.async brings into one
// half of a double buffer while the other is at work: one barrier per tile. A warp owns 32 of the queries and sees all
// keys, so the softmax needs no other warp; the accumulators of S = Q K^T, rounded in place, are the left operand of
// P V. Only tiles on the diagonal are masked, and a warp skips those that none of its rows sees.
//
// Why 32 rows a warp: one ldmatrix_x4 (512 bytes, 4 cycles of the SM's 128 bytes per cycle) then feeds 4 products
// instead of 2. For a head of 64, a piece of 32 queries x 64 keys is, counted in the sm_90a code, 128 mma, 32 ldmatrix,
// 64 ex2 and 300 other instructions (64 each of max, fma, add; 32 conversions; addresses, loop, copies). On an H100
// that is, in cycles of one of the SM's four quarters: tensor core 512 at its full rate (of which mma.sync reaches
// part), exponentials 512 (16 per SM and cycle), issue 520, and shared memory 512, four warps taking turns. With 16
// rows shared memory would take 1024 and be the limit. No unit has work for more than 520 cycles, and 220 TFLOP/s
// (causality counted as half, a diagonal of 128 x 64 tiles costing 12% at T = 1024; 132 SMs at 1.755 GHz) are 1,960
// cycles a piece: what matters is that different warps use different units at a time, two per quarter at 233 to 246
// registers.
//
// The running maximum is only followed when a score exceeds it by 2^8: any shift gives the same result as long as
// nothing overflows (2^8 T does not), P has the same relative precision in bf16 whatever its size, and correcting the
// sums so rarely leaves it out of the usual path. Each row decides for itself, so a row's bits depend on its inputs
// only.
#pragma once

#include "kernels/cuda/attention_fragments.cuh"

// Sizes for each head dimension: as many rows and keys as registers allow without spills (255 a thread). Queries that
// are not held in registers are read again for each tile.
template <int kDim, int kWarpRows, int kWarpsPerBlock, int kKeysPerTile, bool kHoldQueries, int kBlocksPerSm>
struct ForwardTilesOf {
  static constexpr int kHeadDim = kDim;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kWarps = kWarpsPerBlock;
  static constexpr int kQueries = kWarps * kWarpRows;
  static constexpr int kKeys = kKeysPerTile;
  static constexpr bool kQueriesInRegisters = kHoldQueries;
  static constexpr int kBlocks = kBlocksPerSm;
  static constexpr size_t kSharedBytes = sizeof(bf16) * kPitch<kDim> * (kQueries + 4 * kKeys);
  static_assert(kSharedBytes <= kLeastSharedMemory);
};
template <int kHeadDim>
struct ForwardTiles;
template <>
struct ForwardTiles<64> : ForwardTilesOf<64, 32, 4, 64, true, 2> {};
// Of which two blocks fit into 100 KB: a multiprocessor of sm_86, 89 and 120 has no more shared memory.
struct SmallForwardTiles : ForwardTilesOf<64, 32, 4, 32, true, 2> {};
template <>
struct ForwardTiles<80> : ForwardTilesOf<80, 32, 4, 64, false, 2> {};
template <>
struct ForwardTiles<96> : ForwardTilesOf<96, 32, 4, 64, false, 2> {};
template <>
struct ForwardTiles<128> : ForwardTilesOf<128, 32, 4, 32, false, 2> {};

template <int kRowTiles>
struct RunningSoftmax {
  float shift[kRowTiles][2];  // what is subtracted from the scores of rows lane / 4 and lane / 4 + 8, in powers of 2
  float normalizer[kRowTiles][2];  // sum of 2^(score - shift) over this lane's columns
};

// Scores (unscaled) become probabilities times some factor of each row, the same for all its tiles.
template <int kRowTiles, int kKeys, int kHeadDim>
__device__ inline void exponentiate(float (&scores)[kRowTiles][kKeys / 8][4], RunningSoftmax<kRowTiles>& softmax,
                                    float (&sums)[kRowTiles][kHeadDim / 8][4], float scale_log2) {
  constexpr float kSlack = 8.0f;  // in powers of 2
  float largest[kRowTiles][2];
  bool any_exceeds = false;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        value = fmaxf(value, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
      largest[r][half] = value * scale_log2;
      any_exceeds |= largest[r][half] > softmax.shift[r][half] + kSlack;
    }
  }
  if (__any_sync(kAllLanes, any_exceeds)) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old_shift = softmax.shift[r][half], row_largest = quad_max(largest[r][half]);
        const float new_shift = row_largest > old_shift + kSlack ? row_largest : old_shift;
        const float correction = exp2_approximate(old_shift - new_shift);
        softmax.shift[r][half] = new_shift;
        softmax.normalizer[r][half] *= correction;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          sums[r][n][2 * half] *= correction;
          sums[r][n][2 * half + 1] *= correction;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[r][n][e] = exp2_approximate(fmaf(scores[r][n][e], scale_log2, -softmax.shift[r][e / 2]));
        softmax.normalizer[r][e / 2] += scores[r][n][e];
      }
    }
  }
}

template <typename Tiles>
__global__ __launch_bounds__(Tiles::kWarps* kWarp,
                             Tiles::kBlocks) void attention_forward_mma_kernel(bf16* out, float* lse, const bf16* qkv,
                                                                               AttentionSizes sizes) {
  constexpr int kHeadDim = Tiles::kHeadDim, kRowTiles = Tiles::kRowTiles, kQueries = Tiles::kQueries;
  constexpr int kKeys = Tiles::kKeys, kThreads = Tiles::kWarps * kWarp, kTileElements = kKeys * kPitch<kHeadDim>;
  const AttentionTile at =
      attention_tile(sizes, static_cast<int>(blockIdx.x), attention_tiles(sizes.sequence, kQueries), true);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_query = at.tile * kQueries, warp_row = warp * 16 * kRowTiles, first_row = first_query + warp_row;
  const int stride = 3 * sizes.channels;
  bf16* const queries = shared_memory<bf16>();
  bf16* const stages = queries + kQueries * kPitch<kHeadDim>;  // K, V of a tile; K, V of the next one
  auto start_tile = [&](int tile) {
    bf16* const stage = stages + tile % 2 * (2 * kTileElements);
    const bf16* const source = qkv + at.packed(sizes, tile * kKeys) + sizes.channels;
    const int rows = sizes.sequence - tile * kKeys;
    start_copy<kKeys, kHeadDim, kThreads>(stage, source, stride, rows);
    start_copy<kKeys, kHeadDim, kThreads>(stage + kTileElements, source + sizes.channels, stride, rows);
    cp_async_commit();
  };
  start_copy<kQueries, kHeadDim, kThreads>(queries, qkv + at.packed(sizes, first_query), stride,
                                           sizes.sequence - first_query);
  start_tile(0);

  float sums[kRowTiles][kHeadDim / 8][4] = {};
  RunningSoftmax<kRowTiles> softmax;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) softmax.shift[r][half] = -INFINITY, softmax.normalizer[r][half] = 0;
  }
  const float scale_log2 = sizes.scale * kLog2E;
  const int past_queries = first_query + kQueries < sizes.sequence ? first_query + kQueries : sizes.sequence;
  const int tiles = attention_tiles(past_queries, kKeys);
  cp_async_wait<0>();
  __syncthreads();
  LeftRows<kHeadDim, Tiles::kQueriesInRegisters> left[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) left[r].load(queries + (warp_row + 16 * r) * kPitch<kHeadDim>, lane);

  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) start_tile(tile + 1);
    const int first_key = tile * kKeys;
    if (first_key < first_row + 16 * kRowTiles) {  // else no row of this warp sees the tile
      const bf16* const keys = stages + tile % 2 * (2 * kTileElements);
      float scores[kRowTiles][kKeys / 8][4] = {};
      dot_rows<kHeadDim, kKeys>(scores, left, keys, lane);
      if (first_key + kKeys - 1 > first_row) hide_future<kRowTiles, kKeys>(scores, first_row, first_key, lane);
      exponentiate<kRowTiles, kKeys, kHeadDim>(scores, softmax, sums, scale_log2);
      add_weighted_rows<kHeadDim, kKeys>(sums, scores, keys + kTileElements, lane);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // A warp's queries are its own: no other warp has read them or will, so they make room for the result.
  const int row = lane / 4, left_rows = sizes.sequence - first_row;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(softmax.normalizer[r][half]);
      inverse[half] = 1.0f / sum;
      const int query = 16 * r + row + 8 * half;
      if (lane % 4 == 0 && query < left_rows)
        lse[at.row(sizes, first_row + query)] = (softmax.shift[r][half] + log2f(sum)) * kLn2;
    }
    round_to_shared<kHeadDim>(shared_memory<uint32_t>() + (warp_row + 16 * r) * (kPitch<kHeadDim> / 2), sums[r],
                              inverse[0], inverse[1], lane);
  }
  __syncwarp();
  store_rows<16 * kRowTiles, kHeadDim>(out + at.channel(sizes, first_row), sizes.channels,
                                       queries + warp_row * kPitch<kHeadDim>, left_rows, lane);
}
