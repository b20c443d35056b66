// optimizer_moments.cu: first and second moments of gradients. Memory-bound: every operation reads each tensor once and
// writes what it changes once.
//
// The factored second moment needs the sums of squares of all rows and of all columns from one read of the gradient. A
// thread block takes a tile of `chunk` rows and 256 columns: a warp walks over rows, eight columns a lane, so that
// column sums stay in registers and a row costs a few shuffles. What a tile adds to its rows and columns goes to
// scratch (about 1 MB each however large the matrix: about 1024 tiles), where finish_kernel() adds the tiles in order.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/orthonormalize.h"
#include "kernels/cuda/state_blocks.cuh"

#include <algorithm>
#include <utility>

namespace {

// ---- factored second moment

constexpr int kTileCols = kRun * kWarp;
constexpr int kRowsAtOnce = 4;  // of a warp: their loads are under way together
constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;
static_assert(kTileThreads == kTileCols);
constexpr int kSharedPitch = kWarp + 4;
constexpr int kFinishRows = 256;                    // rows a thread block of finish_kernel() takes
constexpr int kFinishCols = 32, kFinishGroups = 8;  // or columns, and threads that share a column

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a matrix is cut; depends on its size alone.
struct Tiling {
  int64_t rows, cols;
  int64_t chunk;   // rows of a tile
  int64_t chunks;  // tiles in a column
  int64_t tiles;   // tiles in a row

  Tiling(int64_t rows, int64_t cols) : rows(rows), cols(cols), tiles(divide_up(cols, kTileCols)) {
    constexpr int64_t kTiles = 1024, kSmallest = kTileWarps * kRowsAtOnce;
    chunk = std::max<int64_t>(1, divide_up(rows * tiles, kTiles * kSmallest)) * kSmallest;
    chunks = divide_up(rows, chunk);
  }

  // Scratch: column sums of `range` tiles of a row, row sums of them, and sums of row statistics.
  int64_t range_bytes(int64_t range) const {
    return static_cast<int64_t>(sizeof(float)) * range * (chunks * kTileCols + rows) + finish_bytes();
  }
  int64_t finish_bytes() const { return static_cast<int64_t>(sizeof(double)) * divide_up(rows, kFinishRows); }
};

// Sums over a warp of kRowsAtOnce numbers a lane at once: afterwards lane l has the sum of sums[row_of_lane_sum(l)].
// Two numbers change places instead of one being copied, so that four sums cost 6 shuffles, not 20.
__device__ inline float warp_sums(const float (&sums)[kRowsAtOnce]) {
  static_assert(kRowsAtOnce == 4);
  const int lane = threadIdx.x % kWarp;
  const bool upper = lane & 16, second = lane & 8;
  const float a = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(kAllLanes, upper ? sums[0] : sums[2], 16);
  const float b = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(kAllLanes, upper ? sums[1] : sums[3], 16);
  float sum = (second ? b : a) + __shfl_xor_sync(kAllLanes, second ? a : b, 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}
__device__ inline int row_of_lane_sum() { return static_cast<int>(threadIdx.x % kWarp) / 8; }

// Eight elements from `column` on of kRowsAtOnce rows from `row` on; zeros where the tile or the matrix ends.
template <typename T>
__device__ inline void load_rows(float (&x)[kRowsAtOnce][kRun], const T* grad, int64_t stride, int64_t row, int64_t end,
                                 int64_t column, int64_t cols, bool aligned) {
  constexpr int kPack = Pack<T>::kSize, kPacks = kRun / kPack;
  const T* const first = grad + row * stride + column;
  if (aligned && column + kRun <= cols && row + kRowsAtOnce <= end) {
    Pack<T> packs[kRowsAtOnce][kPacks];  // all loads before the first use
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
#pragma unroll
      for (int part = 0; part < kPacks; ++part) packs[k][part] = load128(first + k * stride + part * kPack);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[k][i] = to_float(packs[k][i / kPack].v[i % kPack]);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kRowsAtOnce; ++k) {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      x[k][i] = row + k < end && column + i < cols ? to_float(first[k * stride + i]) : 0.0f;
  }
}

// Sums of squares of one tile: row_sums[tile][row], column_sums[chunk][column of the range].
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    squares_kernel(const T* grad, int64_t stride, bool aligned, Tiling tiling, int64_t first_tile, int64_t range,
                   float* row_sums, float* column_sums, const StepScalars* scalars) {
  if (scalars->gate == 0) return;
  float* const shared = shared_memory<float>();  // [kTileWarps][kRun][kSharedPitch]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tile = blockIdx.x, chunk = blockIdx.y;
  const int64_t column = (first_tile + tile) * kTileCols + lane * kRun;
  const int64_t begin = chunk * tiling.chunk;
  const int64_t end = begin + tiling.chunk < tiling.rows ? begin + tiling.chunk : tiling.rows;
  float columns[kRun] = {};
  for (int64_t row = begin + warp * kRowsAtOnce; row < end; row += kTileWarps * kRowsAtOnce) {
    float x[kRowsAtOnce][kRun], sums[kRowsAtOnce];
    load_rows(x, grad, stride, row, end, column, tiling.cols, aligned);
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      sums[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        sums[k] = fmaf(x[k][i], x[k][i], sums[k]);
        columns[i] = fmaf(x[k][i], x[k][i], columns[i]);
      }
    }
    const float sum = warp_sums(sums);
    const int64_t sum_row = row + row_of_lane_sum();
    if (lane % 8 == 0 && sum_row < end) row_sums[tile * tiling.rows + sum_row] = sum;
  }
  // Element i of a lane goes to row i of kRun: neither these stores nor the loads after them meet in a bank.
#pragma unroll
  for (int i = 0; i < kRun; ++i) shared[(warp * kRun + i) * kSharedPitch + lane] = columns[i];
  __syncthreads();
  float total = 0.0f;
  const int from = static_cast<int>(threadIdx.x % kRun * kSharedPitch + threadIdx.x / kRun);
#pragma unroll
  for (int k = 0; k < kTileWarps; ++k) total += shared[k * kRun * kSharedPitch + from];
  column_sums[(chunk * range + tile) * kTileCols + threadIdx.x] = total;
}

// Everything a factored second moment is made of, for the kernels after the first.
struct Factored {
  float *row_state, *col_state, *row_scale, *col_scale;
  double* state_sums;  // of row_state, kFinishRows rows each
  const float *row_sums, *column_sums;
  float eps1;
};

// One of kFinishCols columns: adds the chunks and makes the new state and the scale of it.
__device__ inline void finish_column(const Factored& f, const Tiling& tiling, int64_t first_tile, int64_t range,
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
  const float mean = total / static_cast<float>(tiling.rows) + f.eps1;
  const float state = beta2 * f.col_state[column] + (1.0f - beta2) * mean;
  f.col_state[column] = state;
  f.col_scale[column] = 1.0f / sqrtf(state);
}

// One of kFinishRows rows: adds the tiles of this range to those of earlier ones, kept in row_scale; after the last
// range makes the new state.
__device__ inline void finish_row(const Factored& f, const Tiling& tiling, int64_t block, int64_t first_tile,
                                  int64_t range, float beta2) {
  const int64_t row = block * kFinishRows + threadIdx.x;
  const bool exists = row < tiling.rows, last = first_tile + range == tiling.tiles;
  float total = exists && first_tile > 0 ? f.row_scale[row] : 0.0f;
  if (exists)
    for (int64_t tile = 0; tile < range; ++tile) total += f.row_sums[tile * tiling.rows + row];
  if (!last) {
    if (exists) f.row_scale[row] = total;
    return;
  }
  float state = 0.0f;
  if (exists) {
    const float mean = total / static_cast<float>(tiling.cols) + f.eps1;
    state = beta2 * f.row_state[row] + (1.0f - beta2) * mean;
    f.row_state[row] = state;
  }
  const double sum = block_sum(static_cast<double>(state), shared_memory<double>());
  if (threadIdx.x == 0) f.state_sums[block] = sum;
}

// The first `column_blocks` thread blocks finish columns, the others rows.
__global__ void __launch_bounds__(kTileThreads)
    finish_kernel(Factored factored, Tiling tiling, int64_t first_tile, int64_t range, int64_t column_blocks,
                  const StepScalars* scalars) {
  if (scalars->gate == 0) return;
  if (blockIdx.x < column_blocks) {
    finish_column(factored, tiling, first_tile, range, scalars->beta2);
  } else {
    finish_row(factored, tiling, blockIdx.x - column_blocks, first_tile, range, scalars->beta2);
  }
}

__global__ void __launch_bounds__(kTileThreads)
    row_scale_kernel(Factored factored, int64_t rows, int64_t sums, const StepScalars* scalars) {
  if (scalars->gate == 0) return;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < sums; i += kTileThreads) sum += factored.state_sums[i];
  sum = block_sum(sum, shared_memory<double>());
  const float mean = static_cast<float>(sum / static_cast<double>(rows));
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishRows + threadIdx.x;
  if (row < rows) factored.row_scale[row] = 1.0f / sqrtf(factored.row_state[row] / mean);
}

// ---- elementwise

// out = in * (factor * row_scale) * col_scale, kElements columns a thread; with 16-byte accesses where `aligned`.
template <typename Out, typename In>
struct ScaleRun {
  static constexpr int kElements = sizeof(Out) == 4 && sizeof(In) == 4 ? 4 : 8;
};

template <typename T, int kCount>
__device__ inline void load_run(float (&x)[kCount], const T* in) {
  constexpr int kPack = Pack<T>::kSize;
#pragma unroll
  for (int part = 0; part < kCount / kPack; ++part) {
    const Pack<T> pack = load128(in + part * kPack);
#pragma unroll
    for (int i = 0; i < kPack; ++i) x[part * kPack + i] = to_float(pack.v[i]);
  }
}

template <typename T, int kCount>
__device__ inline void store_run(T* out, const float (&x)[kCount]) {
  constexpr int kPack = Pack<T>::kSize;
#pragma unroll
  for (int part = 0; part < kCount / kPack; ++part) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.v[i] = from_float<T>(x[part * kPack + i]);
    store128(out + part * kPack, pack);
  }
}

template <typename Out, typename In>
__global__ void __launch_bounds__(kStateThreads)
    scale_rows_cols_kernel(Out* out, int64_t out_stride, const In* in, int64_t in_stride, const float* row_scale,
                           const float* col_scale, float factor, int64_t rows, int64_t cols, bool aligned) {
  constexpr int kElements = ScaleRun<Out, In>::kElements;
  const uint32_t runs = static_cast<uint32_t>((cols + kElements - 1) / kElements);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStateThreads + threadIdx.x;
  const int64_t row = index <= 0xffffffffll ? static_cast<uint32_t>(index) / runs : index / runs;
  if (row >= rows) return;
  const int64_t column = (index - row * runs) * kElements;
  const float row_factor = row_scale ? factor * row_scale[row] : factor;
  const In* const from = in + row * in_stride + column;
  Out* const to = out + row * out_stride + column;
  if (aligned && column + kElements <= cols) {
    float x[kElements], scales[kElements];
    load_run(x, from);
    if (col_scale) load_run(scales, col_scale + column);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] *= col_scale ? row_factor * scales[i] : row_factor;
    store_run(to, x);
    return;
  }
  for (int i = 0; i < kElements && column + i < cols; ++i)
    to[i] = from_float<Out>(to_float(from[i]) * (col_scale ? row_factor * col_scale[column + i] : row_factor));
}

__global__ void __launch_bounds__(kStateThreads)
    full_second_moment_kernel(BlockTensor grad, BlockTensor second_moment, int64_t elements, float eps1,
                              const StepScalars* scalars) {
  const Run run = run_of_lane(block_of_warp(), elements);
  if (run.block * kQuantBlock >= elements) return;
  const RawRun raw_g = fetch(grad, run), raw_v = fetch(second_moment, run);
  if (scalars->gate == 0) return;
  const float beta2 = scalars->beta2, one_minus_beta2 = 1.0f - beta2;
  float g[kRun], v[kRun];
  decode(g, raw_g, grad.dtype);
  decode(v, raw_v, second_moment.dtype);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    v[i] = beta2 * v[i] + one_minus_beta2 * (g[i] * g[i] + eps1);
    g[i] = g[i] / sqrtf(v[i]);
  }
  store(second_moment, run, v);
  store(grad, run, g);
}

// M <- beta1 M + (1 - beta1) in, and with `write_back` in <- M before M is rounded.
__global__ void __launch_bounds__(kStateThreads)
    momentum_kernel(BlockTensor momentum, BlockTensor in, bool write_back, int64_t elements, float beta1,
                    const StepScalars* scalars) {
  const Run run = run_of_lane(block_of_warp(), elements);
  if (run.block * kQuantBlock >= elements) return;
  const RawRun raw_m = fetch(momentum, run), raw_in = fetch(in, run);
  if (scalars->gate == 0) return;
  const float one_minus_beta1 = 1.0f - beta1;
  float m[kRun], x[kRun];
  decode(m, raw_m, momentum.dtype);
  decode(x, raw_in, in.dtype);
#pragma unroll
  for (int i = 0; i < kRun; ++i) m[i] = beta1 * m[i] + one_minus_beta1 * x[i];
  store(momentum, run, m);
  if (write_back) store(in, run, m);
}

bool rows_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (t.rows() <= 1 || t.leading_dimension() * static_cast<int64_t>(dtype_size(t.dtype)) % 16 == 0);
}

}  // namespace

// For every matrix of a GPT-2 at once; a wider one goes through the same scratch range by range.
size_t optimizer_scratch_bytes(const KernelShapes& shapes) {
  const int64_t c = std::max<int64_t>(shapes.channels, 1), v = std::max<int64_t>(shapes.vocabulary, 1),
                t = std::max<int64_t>(shapes.sequence, 1);
  int64_t bytes = 0;
  for (auto [rows, cols] : {std::pair{v, c}, {t, c}, {c, 3 * c}, {c, c}, {c, 4 * c}, {4 * c, c}}) {
    const Tiling tiling(rows, cols);
    bytes = std::max(bytes, tiling.range_bytes(tiling.tiles));
  }
  return std::max(static_cast<size_t>(bytes), orthonormalize_scratch_bytes(c));
}

void CudaBackend::factored_second_moment(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                                         Tensor grad, float eps1, const StepScalars* scalars) {
  const int64_t rows = grad.rows(), cols = grad.cols();
  require(row_state.elements() == rows && row_scale.elements() == rows && col_state.elements() == cols &&
              col_scale.elements() == cols && has_uniform_rows(grad),
          "factored_second_moment: shapes differ");
  const Timed timed(*this, "factored_second_moment", 4.0 * rows * cols, static_cast<double>(grad.bytes()));
  const Tiling tiling(rows, cols);
  const int64_t tile_bytes = tiling.range_bytes(1) - tiling.finish_bytes();
  const int64_t fitting = (static_cast<int64_t>(workspace_bytes_) - tiling.finish_bytes()) / tile_bytes;
  const int64_t range = std::clamp<int64_t>(fitting, 1, tiling.tiles);
  Factored factored = {row_state.as<float>(),
                       col_state.as<float>(),
                       row_scale.as<float>(),
                       col_scale.as<float>(),
                       nullptr,
                       nullptr,
                       nullptr,
                       eps1};
  factored.state_sums = scratch<double>(static_cast<size_t>(tiling.range_bytes(range)));
  const int64_t row_blocks = divide_up(rows, kFinishRows);
  float* const row_sums = reinterpret_cast<float*>(factored.state_sums + row_blocks);
  float* const column_sums = row_sums + range * rows;
  factored.row_sums = row_sums;
  factored.column_sums = column_sums;
  const bool aligned = rows_aligned(grad);
  for (int64_t tile = 0; tile < tiling.tiles; tile += range) {
    const int64_t here = std::min(range, tiling.tiles - tile);
    dispatch(grad.dtype, [&]<typename T>() {
      launch("squares", squares_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(here), static_cast<unsigned>(tiling.chunks)),
              .block = kTileThreads,
              .shared_bytes = kTileWarps * kRun * kSharedPitch * sizeof(float),
              .stream = stream_},
             grad.as<T>(), grad.leading_dimension(), aligned, tiling, tile, here, row_sums, column_sums, scalars);
    });
    const int64_t column_blocks = here * kTileCols / kFinishCols;
    launch("finish_factored", finish_kernel,
           {.grid = dim3(static_cast<unsigned>(column_blocks + row_blocks)),
            .block = kTileThreads,
            .shared_bytes = kTileThreads * sizeof(float),
            .stream = stream_},
           factored, tiling, tile, here, column_blocks, scalars);
  }
  launch("row_scale", row_scale_kernel,
         {.grid = dim3(static_cast<unsigned>(row_blocks)),
          .block = kTileThreads,
          .shared_bytes = kTileWarps * sizeof(double),
          .stream = stream_},
         factored, rows, row_blocks, scalars);
}

void CudaBackend::full_second_moment(Tensor grad, Tensor second_moment, float eps1, const StepScalars* scalars) {
  require_elements(second_moment, grad.elements(), "full_second_moment: sizes differ");
  require(grad.contiguous(), "full_second_moment: the gradient must be contiguous");
  const Timed timed(*this, "full_second_moment", 0, static_cast<double>(2 * grad.bytes() + 2 * second_moment.bytes()));
  launch("full_second_moment", full_second_moment_kernel,
         {.grid = state_grid(grad.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(grad),
         block_tensor(second_moment), grad.elements(), eps1, scalars);
}

void CudaBackend::scale_rows_cols(Tensor out, Tensor in, Tensor row_scale, Tensor col_scale, float factor) {
  const int64_t rows = in.rows(), cols = in.cols();
  require(out.rows() == rows && out.cols() == cols && has_uniform_rows(in) && has_uniform_rows(out) &&
              (row_scale.empty() || row_scale.elements() == rows) &&
              (col_scale.empty() || col_scale.elements() == cols),
          "scale_rows_cols: shapes differ");
  const Timed timed(*this, "scale_rows_cols", 0, static_cast<double>(in.bytes() + out.bytes()));
  if (in.elements() == 0) return;
  const bool aligned = rows_aligned(out) && rows_aligned(in) && reinterpret_cast<uintptr_t>(col_scale.data) % 16 == 0;
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    const int64_t runs = rows * divide_up(cols, ScaleRun<Out, In>::kElements);
    launch("scale_rows_cols", scale_rows_cols_kernel<Out, In>,
           {.grid = dim3(static_cast<unsigned>(divide_up(runs, kStateThreads))),
            .block = kStateThreads,
            .stream = stream_},
           out.as<Out>(), out.leading_dimension(), in.as<In>(), in.leading_dimension(), row_scale.as<float>(),
           col_scale.as<float>(), factor, rows, cols, aligned);
  });
}

void CudaBackend::momentum_update(Tensor update, Tensor momentum, float beta1, const StepScalars* scalars) {
  require_elements(momentum, update.elements(), "momentum_update: sizes differ");
  require(update.contiguous(), "momentum_update: the update must be contiguous");
  const Timed timed(*this, "momentum_update", 0, static_cast<double>(2 * update.bytes() + 2 * momentum.bytes()));
  launch("momentum_update", momentum_kernel,
         {.grid = state_grid(update.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(momentum),
         block_tensor(update), true, update.elements(), beta1, scalars);
}

void CudaBackend::ema(Tensor momentum, Tensor in, float beta1, const StepScalars* scalars) {
  require_elements(momentum, in.elements(), "ema: sizes differ");
  require(in.contiguous(), "ema: the input must be contiguous");
  const Timed timed(*this, "ema", 0, static_cast<double>(in.bytes() + 2 * momentum.bytes()));
  launch("ema", momentum_kernel, {.grid = state_grid(in.elements()), .block = kStateThreads, .stream = stream_},
         block_tensor(momentum), block_tensor(in), false, in.elements(), beta1, scalars);
}
