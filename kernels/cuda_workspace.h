// cuda_workspace.h: the limits of the CUDA backend, how much scratch its operations take, and the cuts of matrices that
// it follows from. No CUDA in here: a machine without a GPU plans for one that has it with the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/backend.h"

// What a model must have (cuda_refuses() in backend.h): rows of whole octets, see kernels/cuda/views.cuh; no more
// channels than the threads of a block hold for LayerNorm; heads that fit into the shared memory of attention.
inline constexpr int64_t kChannelMultiple = 8, kMostNormChannels = 16384, kMostHeadChannels = 256;

// What cuBLASLt may use; part of the plan, the same on every device.
inline constexpr size_t kCublasWorkspaceBytes = size_t{32} << 20;
// What is left of it for a product whose matrices are copied into the rest first (kernels/cuda/matmul_staging.cu).
inline constexpr size_t kStagedProductWorkspace = size_t{8} << 20;

// Sums (kernels/cuda/reductions.cu, column_sums.cuh): the most partial sums that a first kernel leaves for a second.
inline constexpr int64_t kMaxSumBlocks = 1024;  // of all elements
inline constexpr int64_t kMaxBiasChunks = 128;  // chunks of rows; cols is up to 4 C: fewer than LayerNorm has
// Of LayerNorm: one block each, about four to an SM of an H200. The partials, [chunks, 2, C] fp32, are written once and
// read once: each time 3% of what the pass over 16K rows in bf16 moves.
inline constexpr int64_t kMaxLayerNormChunks = 512;

// Attention's tensor-core kernels leave the sums of the columns of each tile of dQ, dK and dV, [B, tiles, 3 C] fp32. A
// tile has so many rows at least: the sums are written once and read once, each time 3% of dQ, dK and dV in bf16.
inline constexpr int kGradientTileRows = 64;
inline int64_t tile_sum_floats(int64_t batch, int64_t sequence, int64_t channels) {
  return batch * divide_up(sequence, kGradientTileRows) * 3 * channels;
}

// Behind the scratch of every stream, which is of whole kScratchAlignment bytes: the counters of arrivals.cuh, zero
// between launches.
inline constexpr size_t kScratchAlignment = 256;
inline constexpr int64_t kArrivalCounters = 2048;
inline constexpr size_t kArrivalBytes = static_cast<size_t>(kArrivalCounters) * sizeof(unsigned);

// How the squares of a matrix are added (kernels/cuda/factored_moment.cu): tiles of `chunk` rows and kCols columns,
// about kMostChunks of them. Depends on the matrix's size alone.
struct SquaresTiling {
  static constexpr int kCols = 256;             // of a tile
  static constexpr int kRowsUnderWay = 32;      // of a thread block; `chunk` is a multiple
  static constexpr int kSumRows = 32;           // rows whose states are added to one double
  static constexpr int64_t kMostChunks = 1024;  // where a row has one tile

  int64_t rows, cols;
  int64_t chunk;   // rows of a tile
  int64_t chunks;  // tiles in a column
  int64_t tiles;   // tiles in a row

  SquaresTiling(int64_t rows, int64_t cols);

  // Scratch: column sums of `range` tiles of a row, row sums of them, and sums of row statistics and of squares.
  int64_t range_bytes(int64_t range) const;
  int64_t finish_bytes() const;
};

// Scratch of an elementwise update that adds the squares of a gradient: a double for each block of threads.
inline constexpr int64_t kUpdateElements = 2048;  // that one of them takes
inline int64_t square_sum_bytes(int64_t elements) {
  return static_cast<int64_t>(sizeof(double)) * divide_up(elements, kUpdateElements);
}

// What CUDA takes of a device's memory beside allocate(): kernels are loaded when they are first used, and graphs live
// on the device, too; at most a 32nd of the device.
inline constexpr size_t kCudaRuntimeReserve = size_t{384} << 20;
// And before anything is allocated, where nobody can measure it: an assumption, a little more than an H100 shows.
inline constexpr size_t kCudaContextBytes = size_t{512} << 20;

// CudaBackend::workspace_bytes(): the largest need of any operation.
size_t cuda_workspace_bytes(const KernelShapes& shapes);
