// factored_moment.cu: the factored second moment of a gradient, at once or in pieces. Memory-bound: one read of the
// gradient, which gives the sums of squares of all rows and of all columns. A thread block takes a tile of `chunk` rows
// and 256 columns: a warp walks over rows, eight columns a lane, so that column sums stay in registers and a row costs
// a few shuffles. What a tile adds to its rows and columns goes to scratch (about 1 MB each however large the matrix:
// about 1024 tiles), where the last block of a column of tiles, and that of a row of them, add them in order and move
// the states on. scales_kernel() has the mean of all rows and makes the scales and what is made of them.
#include <algorithm>

#include "kernels/cuda/arrivals.cuh"
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
constexpr int kChunkGroups = 8;  // sums of every eighth chunk, whose loads are under way together
static_assert(SquaresTiling::kSumRows == kWarp && SquaresTiling::kRowsUnderWay % kWarp == 0);

// Which row's sum a lane has after warp_sums().
__device__ inline int row_of_lane_sum() { return static_cast<int>(threadIdx.x % kWarp) / (kWarp / kRowsAtOnce); }

// Everything a factored second moment is made of. Without states the means of the rows and the sums of the columns stay
// where the scales would be.
struct Factored {
  float *row_state = nullptr, *col_state = nullptr;
  float *row_scale = nullptr, *col_scale = nullptr;
  float eps1 = 0;
  bool accumulate = false;        // the sums of the columns
  double* state_sums = nullptr;   // of row_state, kSumRows rows each
  double* square_sums = nullptr;  // of the gradient's squares in these rows
  SquaresTarget squares = {};     // all of them
};

// The tiles of a launch, `count` columns of them from `first` on, and what each adds to its rows and columns.
struct TileRange {
  SquaresTiling tiling;
  int64_t first, count;
  float* row_sums;     // [tile][row]
  float* column_sums;  // [chunk][column of the range]
  unsigned* arrived;   // one counter for each column of tiles, then one for each chunk

  __device__ bool is_last() const { return first + count == tiling.tiles; }
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

// By whole warps, of neighbouring rows from a multiple of kSumRows on.
__device__ inline void leave_sum(double* sums, int64_t row, double value) {
  const double sum = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[row / SquaresTiling::kSumRows] = sum;
}

__device__ inline void finish_row_state(const Factored& f, int64_t row, bool exists, float mean, float beta2) {
  float state = 0.0f;
  if (exists) {
    state = beta2 * f.row_state[row] + (1.0f - beta2) * mean;
    f.row_state[row] = state;
  }
  leave_sum(f.state_sums, row, static_cast<double>(state));
}

// By all threads of a block, one column each of column `tile` of tiles: adds the chunks.
__device__ inline void finish_columns(const Factored& f, const TileRange& range, int64_t tile, float beta2) {
  const SquaresTiling& tiling = range.tiling;
  const int64_t in_range = tile * kTileCols + threadIdx.x, column = range.first * kTileCols + in_range;
  if (column >= tiling.cols) return;
  float sums[kChunkGroups] = {};
  for (int64_t chunk = 0; chunk < tiling.chunks; chunk += kChunkGroups) {
#pragma unroll
    for (int i = 0; i < kChunkGroups; ++i) {
      if (chunk + i < tiling.chunks) sums[i] += range.column_sums[(chunk + i) * range.count * kTileCols + in_range];
    }
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunkGroups; ++i) total += sums[i];
  const float rows = static_cast<float>(tiling.rows);
  if (f.col_state) {
    finish_column_state(f, column, total / rows + f.eps1, beta2);
  } else {
    const float before = f.accumulate ? f.col_scale[column] : 0.0f;
    f.col_scale[column] = before + (total + rows * f.eps1);
  }
}

// By all threads of a block, a row each of [begin, end): adds the tiles of this range to those of earlier ones, kept in
// row_scale, up to the last.
__device__ inline void finish_rows(const Factored& f, const TileRange& range, int64_t begin, int64_t end, float beta2,
                                   bool open) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t row = begin + threadIdx.x; row - lane < end; row += kTileThreads) {
    const bool exists = row < end;
    float total = exists && range.first > 0 ? f.row_scale[row] : 0.0f;
    if (exists) {
#pragma unroll 8
      for (int64_t tile = 0; tile < range.count; ++tile) total += range.row_sums[tile * range.tiling.rows + row];
    }
    if (!range.is_last()) {
      if (exists) f.row_scale[row] = total;
      continue;
    }
    if (f.squares.out) leave_sum(f.square_sums, row, static_cast<double>(total));
    if (!open) continue;
    const float mean = total / static_cast<float>(range.tiling.cols) + f.eps1;
    if (f.row_state) {
      finish_row_state(f, row, exists, mean, beta2);
    } else if (exists) {
      f.row_scale[row] = mean;
    }
  }
}

// Block (x, y): the sums of squares of tile x of the range in chunk y.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    squares_kernel(VectorView<T, kOctet> grad, bool octet_rows, Factored factored, TileRange range,
                   const StepScalars* scalars) {
  const bool open = !scalars || scalars->gate != 0;
  if (!open && !factored.squares.out) return;
  float* const shared = shared_memory<float>();  // [kTileWarps][kOctet][kSharedPitch]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const SquaresTiling& tiling = range.tiling;
  const int64_t tile = blockIdx.x, chunk = blockIdx.y;
  const int64_t column = (range.first + tile) * kTileCols + lane * kOctet;
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
    if (lane % 8 == 0 && sum_row < end) range.row_sums[tile * tiling.rows + sum_row] = sum;
  }
  // Element i of a lane goes to row i of kOctet: neither these stores nor the loads after them meet in a bank.
#pragma unroll
  for (int i = 0; i < kOctet; ++i) shared[(warp * kOctet + i) * kSharedPitch + lane] = columns[i];
  __syncthreads();
  float total = 0.0f;
  const int from = static_cast<int>(threadIdx.x % kOctet * kSharedPitch + threadIdx.x / kOctet);
#pragma unroll
  for (int k = 0; k < kTileWarps; ++k) total += shared[k * kOctet * kSharedPitch + from];
  range.column_sums[(chunk * range.count + tile) * kTileCols + threadIdx.x] = total;

  const float beta2 = scalars ? scalars->beta2 : 0.0f;
  const auto [last_of_columns, last_of_rows] =
      last_of_two_to_arrive({range.arrived + tile, gridDim.y}, {range.arrived + range.count + chunk, gridDim.x},
                            reinterpret_cast<unsigned*>(shared));
  if (last_of_columns && open) finish_columns(factored, range, tile, beta2);
  if (last_of_rows) finish_rows(factored, range, begin, end, beta2, open);
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
    const int64_t row = (block - column_blocks) * kTileThreads + threadIdx.x;
    if (row - threadIdx.x % kWarp >= rows) return;
    finish_row_state(factored, row, row < rows, row < rows ? factored.row_scale[row] : 0.0f, scalars->beta2);
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

// The sum of what leave_sum() has left for all rows, in all threads.
__device__ inline double sum_of_rows(const double* sums, int64_t rows, double* shared) {
  const int64_t count = divide_up(rows, SquaresTiling::kSumRows);
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kTileThreads) total += sums[i];
  return block_sum(total, shared);
}

// The first `row_blocks` thread blocks make the scales of the rows, the others the projection.
template <ProjectionKind kKind>
__global__ void __launch_bounds__(kTileThreads)
    scales_kernel(Factored factored, int64_t rows, int64_t row_blocks, ProjectionOutputs projection,
                  const StepScalars* scalars) {
  double* const shared = shared_memory<double>();
  if (blockIdx.x == 0 && factored.squares.out) {
    const double sum = sum_of_rows(factored.square_sums, rows, shared);
    if (threadIdx.x == 0) store_sum(factored.squares.out, sum, factored.squares.accumulate);
  }
  if (scalars->gate == 0) return;
  const double sum = sum_of_rows(factored.state_sums, rows, shared);
  const float mean = static_cast<float>(sum / static_cast<double>(rows));
  if (blockIdx.x >= row_blocks) {
    const int64_t block = (static_cast<int64_t>(blockIdx.x) - row_blocks) * kTileWarps + threadIdx.x / kWarp;
    scaled_projection_octet<kKind>(projection, factored, block, mean);
    return;
  }
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (row < rows) factored.row_scale[row] = row_scale_of(factored, row, mean);
}

// How many tiles of a row the scratch has room for at once, and counters.
int64_t range_of(const SquaresTiling& tiling, size_t workspace_bytes) {
  const int64_t tile_bytes = tiling.range_bytes(1) - tiling.finish_bytes();
  const int64_t fitting = (static_cast<int64_t>(workspace_bytes) - tiling.finish_bytes()) / tile_bytes;
  return std::clamp<int64_t>(std::min(fitting, kArrivalCounters - tiling.chunks), 1, tiling.tiles);
}

// `scratch`: of range_bytes(range).
void launch_squares(cudaStream_t stream, Factored& factored, const Tensor& grad, const SquaresTiling& tiling,
                    int64_t range, double* scratch, unsigned* arrived, const StepScalars* scalars) {
  const int64_t row_sums = divide_up(tiling.rows, SquaresTiling::kSumRows);
  factored.state_sums = scratch;
  factored.square_sums = scratch + row_sums;
  TileRange tiles = {.tiling = tiling,
                     .first = 0,
                     .count = range,
                     .row_sums = reinterpret_cast<float*>(scratch + 2 * row_sums),
                     .column_sums = nullptr,
                     .arrived = arrived};
  tiles.column_sums = tiles.row_sums + range * tiling.rows;
  for (; tiles.first < tiling.tiles; tiles.first += range) {
    tiles.count = std::min(range, tiling.tiles - tiles.first);
    dispatch(grad.dtype, [&]<typename T>() {
      launch("squares", squares_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(tiles.count), static_cast<unsigned>(tiling.chunks)),
              .block = kTileThreads,
              .shared_bytes = kTileWarps * kOctet * kSharedPitch * sizeof(float),
              .stream = stream},
             vector_view<T, kOctet>(grad), has_octet_rows(grad), factored, tiles, scalars);
    });
  }
}

void launch_row_scales(cudaStream_t stream, const Factored& factored, int64_t rows, const ScaledProjection* projection,
                       const StepScalars* scalars) {
  const int64_t row_blocks = divide_up(rows, kTileThreads);
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
                       .eps1 = eps1,
                       .squares = squares};
  double* const sums = scratch<double>(static_cast<size_t>(tiling.range_bytes(range)));
  launch_squares(stream_, factored, grad, tiling, range, sums, arrivals_, scalars);
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
  double* const sums = scratch<double>(static_cast<size_t>(tiling.range_bytes(range)));
  launch_squares(stream_, factored, grad, tiling, range, sums, arrivals_, nullptr);
}

void CudaBackend::factored_scales(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                                  const StepScalars* scalars) {
  check_factored_scales(row_state, col_state, row_scale, col_scale);
  const int64_t rows = row_scale.elements(), cols = col_scale.elements();
  const Timed timed(*this, "factored_scales", 0, 4.0 * static_cast<double>(row_scale.bytes() + col_scale.bytes()));
  const int64_t column_blocks = divide_up(cols, kTileThreads), row_blocks = divide_up(rows, kTileThreads);
  Factored factored = {.row_state = row_state.as<float>(),
                       .col_state = col_state.as<float>(),
                       .row_scale = row_scale.as<float>(),
                       .col_scale = col_scale.as<float>()};
  factored.state_sums = scratch<double>(static_cast<size_t>(divide_up(rows, SquaresTiling::kSumRows)) * sizeof(double));
  launch("factored_states", states_kernel,
         {.grid = dim3(static_cast<unsigned>(column_blocks + row_blocks)), .block = kTileThreads, .stream = stream_},
         factored, rows, cols, column_blocks, scalars);
  launch_row_scales(stream_, factored, rows, nullptr, scalars);
}
