// attention_fragments.cuh: moving tiles of bf16 rows between global memory, shared memory and the registers of
// mma_m16n8k16, for the tensor-core attention kernels.
//
// Rows in shared memory are 8 elements longer than the head: for heads of 64, 80, 96 and 128 a row is then an odd
// number of 16-byte pieces, so 8 consecutive rows of the same column lie in 8 different groups of banks, and no
// ldmatrix and no 4-byte store of an accumulator has a bank conflict. Unlike an exclusive-or swizzle this leaves every
// address of an unrolled loop one register plus a constant.
#pragma once

#include <cmath>

#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/reduce.cuh"

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

template <int kHeadDim>
inline constexpr int kPitch = kHeadDim + 8;  // elements from row to row in shared memory

// Starts to copy kRows rows of a head, `stride` elements apart, into shared memory; zeros from row `rows` on. In each
// pass as many threads as make whole rows copy 16 bytes each, so that a thread needs one address and one step.
template <int kRows, int kHeadDim, int kThreads>
__device__ inline void start_copy(bf16* tile, const bf16* source, int stride, int rows) {
  constexpr int kPieces = kHeadDim / 8, kRowsPerPass = kThreads / kPieces;
  const int thread = static_cast<int>(threadIdx.x), row = thread / kPieces, column = thread % kPieces * 8;
  source += static_cast<int64_t>(row) * stride + column;
  tile += row * kPitch<kHeadDim> + column;
#pragma unroll
  for (int first = 0; first < kRows; first += kRowsPerPass) {
    const bool mine =
        (kThreads % kPieces == 0 || row < kRowsPerPass) && (first + kRowsPerPass <= kRows || first + row < kRows);
    if (mine) cp_async16(tile + first * kPitch<kHeadDim>, source, first + row < rows);
    source += static_cast<int64_t>(kRowsPerPass) * stride;
  }
}

// A lane's place in what ldmatrix reads. A 16 x 16 block with rows along m (the left operand), or along k and then
// transposed (the right operand of P V): left and transposed right happen to be the same. Or 16 rows along n (the right
// operand of Q K^T).
template <int kHeadDim>
__device__ inline int left_or_transposed_offset(int lane) {
  return lane % 16 * kPitch<kHeadDim> + lane / 16 * 8;
}
template <int kHeadDim>
__device__ inline int right_offset(int lane) {
  return (lane % 8 + lane / 16 * 8) * kPitch<kHeadDim> + lane / 8 % 2 * 8;
}

// Two neighbouring 16 x 8 pieces of a product: d0, d1 += a * (right halves of what ldmatrix_x4 read).
__device__ inline void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
  mma_m16n8k16(d0, a, b0);
  mma_m16n8k16(d1, a, b1);
}

// The accumulators of two neighbouring 16 x 8 pieces, rounded, are the left operand of the next product: same
// registers.
__device__ inline void pack_left(uint32_t (&a)[4], const float (&d0)[4], const float (&d1)[4]) {
  a[0] = pack_bf16(d0[0], d0[1]);
  a[1] = pack_bf16(d0[2], d0[3]);
  a[2] = pack_bf16(d1[0], d1[1]);
  a[3] = pack_bf16(d1[2], d1[3]);
}

// The left operand, 16 rows of a head: from shared memory once, or each time it is used, which saves registers.
template <int kHeadDim, bool kInRegisters>
struct LeftRows {
  const bf16* address = nullptr;  // of this lane
  uint32_t fragments[kInRegisters ? kHeadDim / 16 : 1][4];

  __device__ void load(const bf16* rows, int lane) {
    address = rows + left_or_transposed_offset<kHeadDim>(lane);
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) ldmatrix_x4(fragments[k], address + 16 * k);
    }
  }

  __device__ void get(uint32_t (&a)[4], int k) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = fragments[k][i];
    } else {
      ldmatrix_x4(a, address + 16 * k);
    }
  }
};

// products += left right^T: each of the warp's rows times each of kColumns rows of a head in shared memory.
template <int kHeadDim, int kColumns, int kRowTiles, bool kInRegisters>
__device__ inline void dot_rows(float (&products)[kRowTiles][kColumns / 8][4],
                                const LeftRows<kHeadDim, kInRegisters> (&left)[kRowTiles], const bf16* right,
                                int lane) {
  right += right_offset<kHeadDim>(lane);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) left[r].get(a[r], k);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, right + 16 * n * kPitch<kHeadDim> + 16 * k);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) mma_pair(products[r][2 * n], products[r][2 * n + 1], a[r], b);
    }
  }
}

// sums += weights rows: for each of the warp's rows the sum of kColumns rows of a head in shared memory, weighted with
// accumulators of an earlier product, rounded.
template <int kHeadDim, int kColumns, int kRowTiles>
__device__ inline void add_weighted_rows(float (&sums)[kRowTiles][kHeadDim / 8][4],
                                         const float (&weights)[kRowTiles][kColumns / 8][4], const bf16* rows,
                                         int lane) {
  rows += left_or_transposed_offset<kHeadDim>(lane);
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) pack_left(a[r], weights[r][2 * k], weights[r][2 * k + 1]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, rows + 16 * k * kPitch<kHeadDim> + 16 * n);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) mma_pair(sums[r][2 * n], sums[r][2 * n + 1], a[r], b);
    }
  }
}

// -infinity where the key comes after the query: first_row + 16 r + lane / 4 (+ 8) sees keys up to itself.
template <int kRowTiles, int kKeys>
__device__ inline void hide_future(float (&scores)[kRowTiles][kKeys / 8][4], int first_row, int first_key, int lane) {
  const int last_visible = first_row + lane / 4 - first_key - lane % 4 * 2;  // of the first row, as a column of lane 0
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + e % 2 > last_visible + 16 * r + e / 2 * 8) scores[r][n][e] = -INFINITY;
      }
    }
  }
}

// The same for scores [keys, queries]: key first_key + 16 r + lane / 4 (+ 8) is seen by the queries from itself on.
template <int kRowTiles, int kQueries>
__device__ inline void hide_past(float (&scores)[kRowTiles][kQueries / 8][4], int first_key, int first_query,
                                 int lane) {
  const int first_seeing = first_key + lane / 4 - first_query - lane % 4 * 2;  // the first key, as a column of lane 0
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + e % 2 < first_seeing + 16 * r + e / 2 * 8) scores[r][n][e] = -INFINITY;
      }
    }
  }
}

// 16 rows of accumulators, each half of them times its factor, rounded into shared memory (32-bit words, pitch as
// above); a lane's rows are lane / 4 and lane / 4 + 8.
template <int kHeadDim>
__device__ inline void round_to_shared(uint32_t* tile, const float (&sums)[kHeadDim / 8][4], float low, float high,
                                       int lane) {
  uint32_t* const first = tile + lane / 4 * (kPitch<kHeadDim> / 2) + lane % 4;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    first[4 * n] = pack_bf16(sums[n][0] * low, sums[n][1] * low);
    first[4 * n + 8 * (kPitch<kHeadDim> / 2)] = pack_bf16(sums[n][2] * high, sums[n][3] * high);
  }
}

// One warp writes `rows` of its kRows rows from shared to global memory, 16 bytes a lane.
template <int kRows, int kHeadDim>
__device__ inline void store_rows(bf16* target, int stride, const bf16* tile, int rows, int lane) {
  constexpr int kPieces = kHeadDim / 8;
#pragma unroll
  for (int i = 0; i < kRows * kPieces / kWarp; ++i) {
    const int index = i * kWarp + lane, row = index / kPieces, column = index % kPieces * 8;
    if (row < rows)
      store128(target + static_cast<int64_t>(row) * stride + column, load128(tile + row * kPitch<kHeadDim> + column));
  }
}

// One warp adds the columns of kRows rows of a head in shared memory: products with ones, which are exact.
template <int kRows, int kHeadDim>
__device__ inline void store_column_sums(float* column_sums, const bf16* tile, int lane) {
  float sums[1][kHeadDim / 8][4] = {}, ones[1][kRows / 8][4];
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) ones[0][n][e] = 1.0f;
  }
  add_weighted_rows<kHeadDim, kRows>(sums, ones, tile, lane);
  if (lane >= 4) return;  // all rows of the product are the same
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    column_sums[8 * n + 2 * lane] = sums[0][n][0];
    column_sums[8 * n + 2 * lane + 1] = sums[0][n][1];
  }
}

// A lane's two columns of a per-column quantity in shared memory.
__device__ inline float2 load_pair(const float* pair) {
  float2 values;
  memcpy(&values, __builtin_assume_aligned(pair, sizeof values), sizeof values);
  return values;
}

// The largest value of the four lanes that share rows.
__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
