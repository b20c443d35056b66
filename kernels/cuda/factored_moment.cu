// factored_moment.cu: the factored second moment of a gradient, at once or in pieces. Memory-bound: one read of the
// gradient, which gives the sums of squares of all rows and of all columns. A thread block takes a tile of `chunk` rows
// and 256 columns: a warp walks over rows, eight columns a lane, so that column sums stay in registers and a row costs
// a few shuffles. What a tile adds to its rows and columns goes to scratch (about 1 MB each however large the matrix:
// about 1024 tiles), where finish_kernel() adds the tiles in order; scales_kernel() has the mean of all rows and makes
// the scales and what is made of them.
#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/projection_numbers.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sum_order.cuh"
#include "kernels/cuda/views.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/operands.h"

namespace {

constexpr int kTileCols = SquaresTiling::kCols;
static_assert(kTileCols == kOctet * kWarp);
constexpr int kRowsAtOnce = 4;  // of a warp: their loads are under way together
constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;
static_assert(kTileThreads == kTileCols && kTileWarps * kRowsAtOnce == SquaresTiling::kRowsUnderWay);
constexpr int kSharedPitch = kWarp + 4;
constexpr int kFinishRows = SquaresTiling::kFinishRows;  // rows a thread block of finish_kernel() takes
constexpr int kFinishCols = 32, kFinishGroups = 8;       // or columns, and threads that share a column

// Which row's sum a lane has after warp_sums().
__device__ inline int row_of_lane_sum() { return static_cast<int>(threadIdx.x % kWarp) / (kWarp / kRowsAtOnce); }

// Sums of squares of one tile: row_sums[tile][row], column_sums[chunk][column of the range].
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    squares_kernel(VectorView<T, kOctet> grad, bool octet_rows, SquaresTiling tiling, int64_t first_tile, int64_t range,
                   float* row_sums, float* column_sums, bool gated, const StepScalars* scalars) {
  if (gated && scalars->gate == 0) return;
  float* const shared = shared_memory<float>();  // [kTileWarps][kOctet][kSharedPitch]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tile = blockIdx.x, chunk = blockIdx.y;
  const int64_t column = (first_tile + tile) * kTileCols + lane * kOctet;
  const int64_t begin = chunk * tiling.chunk;
  const int64_t end = begin + tiling.chunk < tiling.rows ? begin + tiling.chunk : tiling.rows;
  float columns[kOctet] = {};
  for (int64_t row = begin + warp * kRowsAtOnce; row < end; row += kTileWarps * kRowsAtOnce) {
    Vector<T, kOctet> raw[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (octet_rows && row + k < end && column < tiling.cols) raw[k] = grad.load_again(row + k, column);
    }
    float sums[kRowsAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (row + k >= end || column >= tiling.cols) continue;
      float x[kOctet] = {};
      if (octet_rows) {
        unpack(raw[k], x);
      } else {
        for (int i = 0; i < kOctet && column + i < tiling.cols; ++i) x[i] = grad.load_one(row + k, column + i);
      }
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        sums[k] = fmaf(x[i], x[i], sums[k]);
        columns[i] = fmaf(x[i], x[i], columns[i]);
      }
    }
    const float sum = warp_sums(sums);
    const int64_t sum_row = row + row_of_lane_sum();
    if (lane % 8 == 0 && sum_row < end) row_sums[tile * tiling.rows + sum_row] = sum;
  }
  // Element i of a lane goes to row i of kOctet: neither these stores nor the loads after them meet in a bank.
#pragma unroll
  for (int i = 0; i < kOctet; ++i) shared[(warp * kOctet + i) * kSharedPitch + lane] = columns[i];
  __syncthreads();
  float total = 0.0f;
  const int from = static_cast<int>(threadIdx.x % kOctet * kSharedPitch + threadIdx.x / kOctet);
#pragma unroll
  for (int k = 0; k < kTileWarps; ++k) total += shared[k * kOctet * kSharedPitch + from];
  column_sums[(chunk * range + tile) * kTileCols + threadIdx.x] = total;
}

// Everything a factored second moment is made of, for the kernels after the first. Without states the means of the rows
// and the sums of the columns stay where the scales would be.
struct Factored {
  float *row_state = nullptr, *col_state = nullptr;
  float *row_scale = nullptr, *col_scale = nullptr;
  float eps1 = 0;
  bool accumulate = false;        // the sums of the columns
  double* state_sums = nullptr;   // of row_state, kFinishRows rows each
  double* square_sums = nullptr;  // of the gradient's squares in these rows
  SquaresTarget squares = {};     // all of them
  const float *row_sums = nullptr, *column_sums = nullptr;
};

// The scale of a row whose state is there, from the mean of all.
__device__ inline float row_scale_of(const Factored& f, int64_t row, float mean) {
  return 1.0f / sqrtf(f.row_state[row] / mean);
}

__device__ inline void finish_column_state(const Factored& f, int64_t column, float mean, float beta2) {
  const float state = beta2 * f.col_state[column] + (1.0f - beta2) * mean;
  f.col_state[column] = state;
  f.col_scale[column] = 1.0f / sqrtf(state);
}

// By all threads of a block, one row each; `block` of the blocks that have rows.
__device__ inline void finish_row_state(const Factored& f, int64_t block, bool exists, float mean, float beta2) {
  const int64_t row = block * kFinishRows + threadIdx.x;
  float state = 0.0f;
  if (exists) {
    state = beta2 * f.row_state[row] + (1.0f - beta2) * mean;
    f.row_state[row] = state;
  }
  const double sum = block_sum(static_cast<double>(state), shared_memory<double>());
  if (threadIdx.x == 0) f.state_sums[block] = sum;
}

// One of kFinishCols columns: adds the chunks.
__device__ inline void finish_column(const Factored& f, const SquaresTiling& tiling, int64_t first_tile, int64_t range,
                                     float beta2) {
  float* const shared = shared_memory<float>();  // [kFinishGroups][kFinishCols]
  const int x = threadIdx.x % kFinishCols, group = threadIdx.x / kFinishCols;
  const int64_t in_range = static_cast<int64_t>(blockIdx.x) * kFinishCols + x;
  const int64_t column = first_tile * kTileCols + in_range;
  float sum = 0.0f;
  for (int64_t chunk = group; chunk < tiling.chunks; chunk += kFinishGroups)
    sum += f.column_sums[chunk * range * kTileCols + in_range];
  shared[group * kFinishCols + x] = sum;
  __syncthreads();
  if (group != 0 || column >= tiling.cols) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kFinishGroups; ++i) total += shared[i * kFinishCols + x];
  const float rows = static_cast<float>(tiling.rows);
  if (f.col_state) {
    finish_column_state(f, column, total / rows + f.eps1, beta2);
  } else {
    const float before = f.accumulate ? f.col_scale[column] : 0.0f;
    f.col_scale[column] = before + (total + rows * f.eps1);
  }
}

// One of kFinishRows rows: adds the tiles of this range to those of earlier ones, kept in row_scale, up to the last.
__device__ inline void finish_row(const Factored& f, const SquaresTiling& tiling, int64_t block, int64_t first_tile,
                                  int64_t range, float beta2, bool open) {
  const int64_t row = block * kFinishRows + threadIdx.x;
  const bool exists = row < tiling.rows, last = first_tile + range == tiling.tiles;
  float total = exists && first_tile > 0 ? f.row_scale[row] : 0.0f;
  if (exists)
    for (int64_t tile = 0; tile < range; ++tile) total += f.row_sums[tile * tiling.rows + row];
  if (last && f.squares.out) {
    const double sum = block_sum(static_cast<double>(exists ? total : 0.0f), shared_memory<double>());
    if (threadIdx.x == 0) f.square_sums[block] = sum;
  }
  if (!open) return;
  const float mean = total / static_cast<float>(tiling.cols) + f.eps1;
  if (last && f.row_state) {
    finish_row_state(f, block, exists, mean, beta2);
  } else if (exists) {
    f.row_scale[row] = last ? mean : total;
  }
}

// The first `column_blocks` thread blocks finish columns, the others rows.
__global__ void __launch_bounds__(kTileThreads)
    finish_kernel(Factored factored, SquaresTiling tiling, int64_t first_tile, int64_t range, int64_t column_blocks,
                  const StepScalars* scalars) {
  const bool open = !scalars || scalars->gate != 0;
  const float beta2 = scalars ? scalars->beta2 : 0.0f;
  if (blockIdx.x >= column_blocks) {
    finish_row(factored, tiling, blockIdx.x - column_blocks, first_tile, range, beta2, open);
  } else if (open) {
    finish_column(factored, tiling, first_tile, range, beta2);
  }
}

// States from means of rows and sums of columns that are already where the scales will be.
__global__ void __launch_bounds__(kTileThreads)
    states_kernel(Factored factored, int64_t rows, int64_t cols, int64_t column_blocks, const StepScalars* scalars) {
  if (scalars->gate == 0) return;
  const int64_t block = blockIdx.x;
  if (block < column_blocks) {
    const int64_t column = block * kTileThreads + threadIdx.x;
    if (column >= cols) return;
    finish_column_state(factored, column, factored.col_scale[column] / static_cast<float>(rows), scalars->beta2);
  } else {
    const int64_t row = (block - column_blocks) * kFinishRows + threadIdx.x;
    finish_row_state(factored, block - column_blocks, row < rows, row < rows ? factored.row_scale[row] : 0.0f,
                     scalars->beta2);
  }
}

// What the projection is made of; no elements when there is none.
struct ProjectionOutputs {
  BlockTensor plain, scaled;
  int64_t elements = 0;
  bool of_rows = false;
  ProjectionNumbers numbers = {};
};

// Eight elements of the projection, as generate_projection() rounds them, and the same scaled.
template <ProjectionKind kKind>
__device__ inline void scaled_projection_octet(const ProjectionOutputs& out, const Factored& factored, int64_t block,
                                               float mean) {
  const Octet octet = octet_of_lane(block, out.elements);
  if (octet.block * kQuantBlock >= out.elements) return;
  const uint32_t dimension = out.numbers.basis.dimension;
  uint32_t column = static_cast<uint32_t>(static_cast<uint64_t>(octet.first) % dimension);
  float x[kOctet], scaled[kOctet];
  projection_octet<kKind>(x, out.numbers, octet.first);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float rounded = out.plain.dtype == DType::kBF16 ? to_float(from_float<bf16>(x[i])) : x[i];
    const float scale = out.of_rows ? row_scale_of(factored, column, mean) : factored.col_scale[column];
    scaled[i] = rounded * scale;
    column = column + 1 == dimension ? 0 : column + 1;
  }
  store(out.plain, octet, x);
  store(out.scaled, octet, scaled);
}

// The first `row_blocks` thread blocks make the scales of the rows, the others the projection.
template <ProjectionKind kKind>
__global__ void __launch_bounds__(kTileThreads)
    scales_kernel(Factored factored, int64_t rows, int64_t row_blocks, ProjectionOutputs projection,
                  const StepScalars* scalars) {
  double* const shared = shared_memory<double>();
  if (blockIdx.x == 0 && factored.squares.out) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < row_blocks; i += kTileThreads) sum += factored.square_sums[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) store_sum(factored.squares.out, sum, factored.squares.accumulate);
  }
  if (scalars->gate == 0) return;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < row_blocks; i += kTileThreads) sum += factored.state_sums[i];
  sum = block_sum(sum, shared);
  const float mean = static_cast<float>(sum / static_cast<double>(rows));
  if (blockIdx.x >= row_blocks) {
    const int64_t block = (static_cast<int64_t>(blockIdx.x) - row_blocks) * kTileWarps + threadIdx.x / kWarp;
    scaled_projection_octet<kKind>(projection, factored, block, mean);
    return;
  }
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishRows + threadIdx.x;
  if (row < rows) factored.row_scale[row] = row_scale_of(factored, row, mean);
}

// How many tiles of a row the scratch has room for at once.
int64_t range_of(const SquaresTiling& tiling, size_t workspace_bytes) {
  const int64_t tile_bytes = tiling.range_bytes(1) - tiling.finish_bytes();
  const int64_t fitting = (static_cast<int64_t>(workspace_bytes) - tiling.finish_bytes()) / tile_bytes;
  return std::clamp<int64_t>(fitting, 1, tiling.tiles);
}

void launch_squares(cudaStream_t stream, Factored factored, const Tensor& grad, const SquaresTiling& tiling,
                    int64_t range, const StepScalars* scalars) {
  const int64_t row_blocks = divide_up(tiling.rows, kFinishRows);
  factored.square_sums = factored.state_sums + row_blocks;
  float* const row_sums = reinterpret_cast<float*>(factored.square_sums + row_blocks);
  float* const column_sums = row_sums + range * tiling.rows;
  factored.row_sums = row_sums;
  factored.column_sums = column_sums;
  for (int64_t tile = 0; tile < tiling.tiles; tile += range) {
    const int64_t here = std::min(range, tiling.tiles - tile);
    dispatch(grad.dtype, [&]<typename T>() {
      launch("squares", squares_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(here), static_cast<unsigned>(tiling.chunks)),
              .block = kTileThreads,
              .shared_bytes = kTileWarps * kOctet * kSharedPitch * sizeof(float),
              .stream = stream},
             vector_view<T, kOctet>(grad), has_octet_rows(grad), tiling, tile, here, row_sums, column_sums,
             scalars && !factored.squares.out, scalars);
    });
    const int64_t column_blocks = here * kTileCols / kFinishCols;
    launch("finish_factored", finish_kernel,
           {.grid = dim3(static_cast<unsigned>(column_blocks + row_blocks)),
            .block = kTileThreads,
            .shared_bytes = kTileThreads * sizeof(float),
            .stream = stream},
           factored, tiling, tile, here, column_blocks, scalars);
  }
}

void launch_row_scales(cudaStream_t stream, const Factored& factored, int64_t rows, const ScaledProjection* projection,
                       const StepScalars* scalars) {
  const int64_t row_blocks = divide_up(rows, kFinishRows);
  ProjectionOutputs outputs;
  if (projection) {
    outputs = {.plain = block_tensor(projection->plain),
               .scaled = block_tensor(projection->scaled),
               .elements = projection->plain.elements(),
               .of_rows = projection->of_rows,
               .numbers = projection_numbers(projection->plain, projection->key, projection->index)};
  }
  const int64_t blocks = row_blocks + divide_up(outputs.elements, kQuantBlock * kTileWarps);
  dispatch(projection ? projection->kind : ProjectionKind::kCosine, [&]<ProjectionKind kKind>() {
    launch("factored_scales", scales_kernel<kKind>,
           {.grid = dim3(static_cast<unsigned>(blocks)),
            .block = kTileThreads,
            .shared_bytes = kTileWarps * sizeof(double),
            .stream = stream},
           factored, rows, row_blocks, outputs, scalars);
  });
}

}  // namespace

void CudaBackend::factored_second_moment(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                                         Tensor grad, float eps1, const StepScalars* scalars, SquaresTarget squares,
                                         const ScaledProjection* projection) {
  check_factored_second_moment(row_state, col_state, row_scale, col_scale, grad);
  if (projection) check_scaled_projection(*projection, grad);
  const int64_t rows = grad.rows(), cols = grad.cols();
  const Timed timed(*this, "factored_second_moment", 4.0 * rows * cols, static_cast<double>(grad.bytes()));
  const SquaresTiling tiling(rows, cols);
  const int64_t range = range_of(tiling, workspace_bytes_);
  Factored factored = {.row_state = row_state.as<float>(),
                       .col_state = col_state.as<float>(),
                       .row_scale = row_scale.as<float>(),
                       .col_scale = col_scale.as<float>(),
                       .eps1 = eps1};
  factored.state_sums = scratch<double>(static_cast<size_t>(tiling.range_bytes(range)));
  factored.squares = squares;
  launch_squares(stream_, factored, grad, tiling, range, scalars);
  factored.square_sums = factored.state_sums + divide_up(rows, kFinishRows);
  launch_row_scales(stream_, factored, rows, projection, scalars);
}

void CudaBackend::factored_squares(Tensor row_squares, Tensor col_squares, Tensor grad, float eps1, bool accumulate) {
  check_factored_squares(row_squares, col_squares, grad);
  const int64_t rows = grad.rows(), cols = grad.cols();
  const Timed timed(*this, "factored_squares", 4.0 * rows * cols, static_cast<double>(grad.bytes()));
  const SquaresTiling tiling(rows, cols);
  const int64_t range = range_of(tiling, workspace_bytes_);
  Factored factored = {.row_scale = row_squares.as<float>(),
                       .col_scale = col_squares.as<float>(),
                       .eps1 = eps1,
                       .accumulate = accumulate};
  factored.state_sums = scratch<double>(static_cast<size_t>(tiling.range_bytes(range)));
  launch_squares(stream_, factored, grad, tiling, range, nullptr);
}

void CudaBackend::factored_scales(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                                  const StepScalars* scalars) {
  check_factored_scales(row_state, col_state, row_scale, col_scale);
  const int64_t rows = row_scale.elements(), cols = col_scale.elements();
  const Timed timed(*this, "factored_scales", 0, 4.0 * static_cast<double>(row_scale.bytes() + col_scale.bytes()));
  const int64_t column_blocks = divide_up(cols, kTileThreads), row_blocks = divide_up(rows, kFinishRows);
  Factored factored = {.row_state = row_state.as<float>(),
                       .col_state = col_state.as<float>(),
                       .row_scale = row_scale.as<float>(),
                       .col_scale = col_scale.as<float>()};
  factored.state_sums = scratch<double>(static_cast<size_t>(row_blocks) * sizeof(double));
  launch("factored_states", states_kernel,
         {.grid = dim3(static_cast<unsigned>(column_blocks + row_blocks)),
          .block = kTileThreads,
          .shared_bytes = kTileWarps * sizeof(double),
          .stream = stream_},
         factored, rows, cols, column_blocks, scalars);
  launch_row_scales(stream_, factored, rows, nullptr, scalars);
}
