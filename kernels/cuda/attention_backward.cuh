// attention_backward.cuh: causal flash attention on the tensor cores, bf16, backward. Compute-bound: 14 HD operations
// for each visible pair of a query and a key, 10 if nothing were computed twice.
//
// With P = 2^(S scale log2(e) - lse log2(e)) and dS = P (dP - delta): dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.
// One kernel owns tiles of keys and walks over queries (S, dP, dV, dK), one owns tiles of queries and walks over keys
// (S, dP, dQ). Both look like the forward kernel: the rows a warp owns are the left operands, held in registers where
// they fit, the other side streams through a double buffer, and accumulators become left operands in place. The first
// kernel computes S^T and dP^T for that reason: then P^T and dS^T are already what dV and dK need, no score passes
// through shared memory, and no warp waits for another but at the one barrier per tile.
//
// For a head of 64, counted in the sm_90a code: the first kernel takes for 16 keys x 32 queries 64 mma, 32 ldmatrix, 16
// ex2 and 97 other instructions; the second for 32 queries x 32 keys 96 mma, 24 ldmatrix, 32 ex2 and 135 others. In
// cycles of a quarter of an H100's SM per 32 x 64 scores (see attention_forward.cuh): tensor core 1024 + 768, shared
// memory 2048 + 768, exponentials 512 + 512, issue 836 + 574. Shared memory limits the first kernel: each of its
// products needs a fragment of its own, because two times 32 rows of sums would leave no registers for anything else (a
// variant with 32 keys and K, V read again saves a quarter of the reads, and a third of the warps). At three blocks of
// four warps the limit of both together is 390 TFLOP/s counted as 5 products at T = 1024, if all overlaps; 130 are a
// third of it.
//
// The gradient of the projection's bias is the sum over all tokens of what is stored. A tile of 64 rows is still in
// shared memory then, and its sums are 32 mma and 16 ldmatrix of one warp: at T = 1024 1.5% of the tile's.
#pragma once

#include "kernels/cuda/attention_fragments.cuh"

// Sizes for each head dimension, chosen like ForwardTiles. A tile is worked on kChunk columns at a time: the scores of
// one chunk are all that must be in registers at once.
template <int kDim, int kWarpKeys, int kWarpsPerBlock, int kQueriesPerTile, int kQueriesAtOnce, bool kHoldKeys,
          int kBlocksPerSm>
struct KeyGradientTilesOf {
  static constexpr int kHeadDim = kDim;
  static constexpr int kRowTiles = kWarpKeys / 16;
  static constexpr int kWarps = kWarpsPerBlock;
  static constexpr int kKeys = kWarps * kWarpKeys;
  static constexpr int kQueries = kQueriesPerTile;
  static constexpr int kChunk = kQueriesAtOnce;
  static constexpr bool kKeysInRegisters = kHoldKeys;
  static constexpr int kBlocks = kBlocksPerSm;
  static constexpr size_t kSharedBytes =
      sizeof(bf16) * kPitch<kDim> * (2 * kKeys + 4 * kQueries) + sizeof(float) * 4 * kQueries;
  static_assert(kSharedBytes <= kLeastSharedMemory);
};
template <int kHeadDim>
struct KeyGradientTiles;
template <>
struct KeyGradientTiles<64> : KeyGradientTilesOf<64, 16, 4, 64, 32, true, 3> {};
struct SmallKeyGradientTiles : KeyGradientTilesOf<64, 16, 4, 32, 32, true, 2> {};
template <>
struct KeyGradientTiles<80> : KeyGradientTilesOf<80, 16, 4, 64, 32, true, 2> {};
template <>
struct KeyGradientTiles<96> : KeyGradientTilesOf<96, 16, 4, 64, 32, true, 2> {};
template <>
struct KeyGradientTiles<128> : KeyGradientTilesOf<128, 16, 4, 32, 32, false, 2> {};

template <int kDim, int kWarpRows, int kWarpsPerBlock, int kKeysPerTile, int kKeysAtOnce, bool kHoldQueries,
          int kBlocksPerSm>
struct QueryGradientTilesOf {
  static constexpr int kHeadDim = kDim;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kWarps = kWarpsPerBlock;
  static constexpr int kQueries = kWarps * kWarpRows;
  static constexpr int kKeys = kKeysPerTile;
  static constexpr int kChunk = kKeysAtOnce;
  static constexpr bool kQueriesInRegisters = kHoldQueries;
  static constexpr int kBlocks = kBlocksPerSm;
  static constexpr size_t kSharedBytes = sizeof(bf16) * kPitch<kDim> * (2 * kQueries + 4 * kKeys);
  static_assert(kSharedBytes <= kLeastSharedMemory);
};
template <int kHeadDim>
struct QueryGradientTiles;
template <>
struct QueryGradientTiles<64> : QueryGradientTilesOf<64, 32, 4, 64, 32, true, 2> {};
struct SmallQueryGradientTiles : QueryGradientTilesOf<64, 16, 4, 32, 32, true, 2> {};
template <>
struct QueryGradientTiles<80> : QueryGradientTilesOf<80, 16, 4, 64, 32, true, 3> {};
template <>
struct QueryGradientTiles<96> : QueryGradientTilesOf<96, 16, 4, 32, 16, true, 3> {};
template <>
struct QueryGradientTiles<128> : QueryGradientTilesOf<128, 16, 4, 32, 32, true, 2> {};

// dK and dV of a tile of keys, summed over the tiles of queries from the diagonal on, and the sums of their columns.
template <typename Tiles>
__global__ __launch_bounds__(Tiles::kWarps* kWarp, Tiles::kBlocks) void attention_backward_keys_mma_kernel(
    bf16* dqkv, float* tile_sums, const bf16* dout, const float* lse, const float* delta, const bf16* qkv,
    AttentionSizes sizes) {
  constexpr int kHeadDim = Tiles::kHeadDim, kRowTiles = Tiles::kRowTiles, kKeys = Tiles::kKeys;
  constexpr int kQueries = Tiles::kQueries, kChunk = Tiles::kChunk, kThreads = Tiles::kWarps * kWarp;
  constexpr int kTileElements = kQueries * kPitch<kHeadDim>;
  static_assert(kThreads >= 2 * kQueries);
  const int key_tiles = attention_tiles(sizes.sequence, kKeys);
  const AttentionTile at = attention_tile(sizes, static_cast<int>(blockIdx.x), key_tiles, false);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int first_key = at.tile * kKeys, warp_row = warp * 16 * kRowTiles, warp_key = first_key + warp_row;
  const int stride = 3 * sizes.channels;
  bf16* const keys = shared_memory<bf16>();
  bf16* const values = keys + kKeys * kPitch<kHeadDim>;
  bf16* const stages = values + kKeys * kPitch<kHeadDim>;  // Q, dO of a tile; Q, dO of the next one
  // lse and delta of a tile and of the next one, behind the stages.
  float* const row_values = shared_memory<float>() + (2 * kKeys + 4 * kQueries) * (kPitch<kHeadDim> / 2);

  auto start_tile = [&](int first_query, int stage) {
    bf16* const tile = stages + stage * (2 * kTileElements);
    const int rows = sizes.sequence - first_query;
    start_copy<kQueries, kHeadDim, kThreads>(tile, qkv + at.packed(sizes, first_query), stride, rows);
    start_copy<kQueries, kHeadDim, kThreads>(tile + kTileElements, dout + at.channel(sizes, first_query),
                                             sizes.channels, rows);
    cp_async_commit();
  };
  // Thread i < kQueries has the log-sum-exp (in powers of 2) of query i, thread kQueries + i the delta. For queries
  // past the end any finite numbers do: their rows of Q and dO are zeros and add nothing.
  auto load_row_value = [&](int first_query) {
    const int query = first_query + thread % kQueries;
    if (query >= sizes.sequence) return 0.0f;
    return thread < kQueries ? lse[at.row(sizes, query)] * kLog2E : delta[at.row(sizes, query)];
  };
  auto store_row_value = [&](float value, int stage) {
    if (thread < 2 * kQueries) row_values[stage * (2 * kQueries) + thread] = value;
  };

  const bf16* const key_source = qkv + at.packed(sizes, first_key) + sizes.channels;
  const int key_rows = sizes.sequence - first_key, first_tile = first_key / kQueries * kQueries;
  start_copy<kKeys, kHeadDim, kThreads>(keys, key_source, stride, key_rows);
  start_copy<kKeys, kHeadDim, kThreads>(values, key_source + sizes.channels, stride, key_rows);
  start_tile(first_tile, 0);
  store_row_value(load_row_value(first_tile), 0);
  float dkey[kRowTiles][kHeadDim / 8][4] = {}, dvalue[kRowTiles][kHeadDim / 8][4] = {};
  const float scale_log2 = sizes.scale * kLog2E;
  cp_async_wait<0>();
  __syncthreads();
  LeftRows<kHeadDim, Tiles::kKeysInRegisters> left_keys[kRowTiles], left_values[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    left_keys[r].load(keys + (warp_row + 16 * r) * kPitch<kHeadDim>, lane);
    left_values[r].load(values + (warp_row + 16 * r) * kPitch<kHeadDim>, lane);
  }

  int stage = 0;
  for (int first_query = first_tile; first_query < sizes.sequence; first_query += kQueries, stage ^= 1) {
    const bool more = first_query + kQueries < sizes.sequence;
    float next_row_value = 0;
    if (more) {
      start_tile(first_query + kQueries, stage ^ 1);
      next_row_value = load_row_value(first_query + kQueries);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < kQueries; chunk += kChunk) {
      const int chunk_query = first_query + chunk;
      if (chunk_query + kChunk <= warp_key) continue;  // all of these queries come before all keys of this warp
      const bf16* const queries = stages + stage * (2 * kTileElements) + chunk * kPitch<kHeadDim>;
      const bf16* const douts = queries + kTileElements;
      float p[kRowTiles][kChunk / 8][4] = {}, ds[kRowTiles][kChunk / 8][4] = {};  // [key, query]
      dot_rows<kHeadDim, kChunk>(p, left_keys, queries, lane);
      dot_rows<kHeadDim, kChunk>(ds, left_values, douts, lane);
      if (chunk_query < warp_key + 16 * kRowTiles - 1) {
        hide_past<kRowTiles, kChunk>(p, warp_key, chunk_query, lane);
      }
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        const float* const pair = row_values + stage * (2 * kQueries) + chunk + 8 * n + lane % 4 * 2;
        const float2 pair_lse = load_pair(pair), pair_delta = load_pair(pair + kQueries);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            p[r][n][e] = exp2_approximate(fmaf(p[r][n][e], scale_log2, e % 2 == 0 ? -pair_lse.x : -pair_lse.y));
            ds[r][n][e] = p[r][n][e] * (ds[r][n][e] - (e % 2 == 0 ? pair_delta.x : pair_delta.y));
          }
        }
      }
      add_weighted_rows<kHeadDim, kChunk>(dkey, ds, queries, lane);
      add_weighted_rows<kHeadDim, kChunk>(dvalue, p, douts, lane);
    }
    if (more) store_row_value(next_row_value, stage ^ 1);
    cp_async_wait<0>();
    __syncthreads();
  }

  // A warp's keys and values are read by no other warp, so they make room for their gradients.
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    uint32_t* const words = shared_memory<uint32_t>() + (warp_row + 16 * r) * (kPitch<kHeadDim> / 2);
    round_to_shared<kHeadDim>(words, dkey[r], sizes.scale, sizes.scale, lane);
    round_to_shared<kHeadDim>(words + kKeys * (kPitch<kHeadDim> / 2), dvalue[r], 1.0f, 1.0f, lane);
  }
  __syncwarp();
  bf16* const target = dqkv + at.packed(sizes, warp_key) + sizes.channels;
  const int rows = sizes.sequence - warp_key, warp_offset = warp_row * kPitch<kHeadDim>;
  store_rows<16 * kRowTiles, kHeadDim>(target, stride, keys + warp_offset, rows, lane);
  store_rows<16 * kRowTiles, kHeadDim>(target + sizes.channels, stride, values + warp_offset, rows, lane);
  __syncthreads();
  if (warp < 2) {  // rows past the end are zeros
    store_column_sums<kKeys, kHeadDim>(tile_sums + at.tile_sums(sizes, key_tiles) + (1 + warp) * sizes.channels,
                                       warp == 0 ? keys : values, lane);
  }
}

// dQ of a tile of queries, summed over the tiles of keys up to the diagonal, and the sums of its columns.
template <typename Tiles>
__global__ __launch_bounds__(Tiles::kWarps* kWarp, Tiles::kBlocks) void attention_backward_queries_mma_kernel(
    bf16* dqkv, float* tile_sums, const bf16* dout, const float* lse, const float* delta, const bf16* qkv,
    AttentionSizes sizes) {
  constexpr int kHeadDim = Tiles::kHeadDim, kRowTiles = Tiles::kRowTiles, kQueries = Tiles::kQueries;
  constexpr int kKeys = Tiles::kKeys, kChunk = Tiles::kChunk, kThreads = Tiles::kWarps * kWarp;
  constexpr int kTileElements = kKeys * kPitch<kHeadDim>;
  const int query_tiles = attention_tiles(sizes.sequence, kQueries);
  const AttentionTile at = attention_tile(sizes, static_cast<int>(blockIdx.x), query_tiles, true);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_query = at.tile * kQueries, warp_row = warp * 16 * kRowTiles, first_row = first_query + warp_row;
  const int stride = 3 * sizes.channels;
  bf16* const queries = shared_memory<bf16>();
  bf16* const douts = queries + kQueries * kPitch<kHeadDim>;
  bf16* const stages = douts + kQueries * kPitch<kHeadDim>;  // K, V of a tile; K, V of the next one
  auto start_tile = [&](int tile) {
    bf16* const stage = stages + tile % 2 * (2 * kTileElements);
    const bf16* const source = qkv + at.packed(sizes, tile * kKeys) + sizes.channels;
    const int rows = sizes.sequence - tile * kKeys;
    start_copy<kKeys, kHeadDim, kThreads>(stage, source, stride, rows);
    start_copy<kKeys, kHeadDim, kThreads>(stage + kTileElements, source + sizes.channels, stride, rows);
    cp_async_commit();
  };
  const int query_rows = sizes.sequence - first_query;
  start_copy<kQueries, kHeadDim, kThreads>(queries, qkv + at.packed(sizes, first_query), stride, query_rows);
  start_copy<kQueries, kHeadDim, kThreads>(douts, dout + at.channel(sizes, first_query), sizes.channels, query_rows);
  start_tile(0);

  float row_lse[kRowTiles][2], row_delta[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_row + 16 * r + lane / 4 + 8 * half;
      const bool exists = query < sizes.sequence;
      row_lse[r][half] = exists ? lse[at.row(sizes, query)] * kLog2E : 0.0f;  // zeros will do: dO is zeros there
      row_delta[r][half] = exists ? delta[at.row(sizes, query)] : 0.0f;
    }
  }
  float dquery[kRowTiles][kHeadDim / 8][4] = {};
  const float scale_log2 = sizes.scale * kLog2E;
  const int past_queries = first_query + kQueries < sizes.sequence ? first_query + kQueries : sizes.sequence;
  const int tiles = attention_tiles(past_queries, kKeys);
  cp_async_wait<0>();
  __syncthreads();
  LeftRows<kHeadDim, Tiles::kQueriesInRegisters> left_queries[kRowTiles], left_douts[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    left_queries[r].load(queries + (warp_row + 16 * r) * kPitch<kHeadDim>, lane);
    left_douts[r].load(douts + (warp_row + 16 * r) * kPitch<kHeadDim>, lane);
  }

  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) start_tile(tile + 1);
#pragma unroll 1
    for (int chunk = 0; chunk < kKeys; chunk += kChunk) {
      const int chunk_key = tile * kKeys + chunk;
      if (chunk_key >= first_row + 16 * kRowTiles) break;  // no row of this warp sees these keys
      const bf16* const keys = stages + tile % 2 * (2 * kTileElements) + chunk * kPitch<kHeadDim>;
      const bf16* const values = keys + kTileElements;
      float p[kRowTiles][kChunk / 8][4] = {}, ds[kRowTiles][kChunk / 8][4] = {};
      dot_rows<kHeadDim, kChunk>(p, left_queries, keys, lane);
      dot_rows<kHeadDim, kChunk>(ds, left_douts, values, lane);
      if (chunk_key + kChunk - 1 > first_row) hide_future<kRowTiles, kChunk>(p, first_row, chunk_key, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            p[r][n][e] = exp2_approximate(fmaf(p[r][n][e], scale_log2, -row_lse[r][e / 2]));
            ds[r][n][e] = p[r][n][e] * (ds[r][n][e] - row_delta[r][e / 2]);
          }
        }
      }
      add_weighted_rows<kHeadDim, kChunk>(dquery, ds, keys, lane);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    round_to_shared<kHeadDim>(shared_memory<uint32_t>() + (warp_row + 16 * r) * (kPitch<kHeadDim> / 2), dquery[r],
                              sizes.scale, sizes.scale, lane);
  }
  __syncwarp();
  store_rows<16 * kRowTiles, kHeadDim>(dqkv + at.packed(sizes, first_row), stride,
                                       queries + warp_row * kPitch<kHeadDim>, sizes.sequence - first_row, lane);
  __syncthreads();
  if (warp == 0) store_column_sums<kQueries, kHeadDim>(tile_sums + at.tile_sums(sizes, query_tiles), queries, lane);
}
