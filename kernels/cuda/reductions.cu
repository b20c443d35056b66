// reductions.cu: sums of all elements and sums of columns. Memory-bound: each element is read once.
// A first kernel leaves partial sums in the workspace, a second one adds them in order; how a sum is cut depends on the
// shape alone. Sums of all elements: fp32 over short runs, joined in double. Sums of columns: a block owns a chunk of
// rows and as many columns as its 32 lanes load at once, a lane keeps its columns' sums in registers, and the warps'
// sums meet in shared memory.
#include <algorithm>

#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/operands.h"

namespace {

constexpr int kSumThreads = 256, kSumUnroll = 4, kSumTile = kSumThreads * kSumUnroll;
constexpr int kSumRun = 16;  // rounds of loads that are added in fp32 before they join a double

constexpr int kColumnWarps = 8, kColumnUnroll = 4;
constexpr int kColumnStep = kColumnWarps * kColumnUnroll;  // rows a block has under way
constexpr int kColumnTile = kWarp * kOctet;

constexpr int kPartialWarps = 16, kPartialUnroll = 8;

// ---- sums of all elements

struct SumResult {
  float* out;
  float factor;
  bool accumulate;

  __device__ void store(double sum) const {
    *out = static_cast<float>(static_cast<double>(factor) * sum + (accumulate ? static_cast<double>(*out) : 0.0));
  }
};

template <bool kSquare, typename View>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(View x, Extent extent, int64_t tiles, double* partials, SumResult result) {
  constexpr int kWidth = View::kWidth;
  const int64_t row_groups = extent.cols / kWidth;
  double total = 0;
  float sums[kWidth] = {};
  int rounds = 0;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_of<kWidth, kSumTile>(extent, index);
    const int64_t first = tile.first + threadIdx.x;
    typename View::Raw raw[kSumUnroll];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int64_t group = first + u * kSumThreads;
      if (group < row_groups) raw[u] = x.load_again(tile.row, group * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      if (first + u * kSumThreads >= row_groups) continue;
      float values[kWidth];
      View::unpack(raw[u], values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] = kSquare ? fmaf(values[i], values[i], sums[i]) : sums[i] + values[i];
    }
    if (++rounds % kSumRun == 0) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        total += static_cast<double>(sums[i]);
        sums[i] = 0;
      }
    }
  }
  for (int i = 0; i < kWidth; ++i) total += static_cast<double>(sums[i]);
  const int64_t tail = row_groups * kWidth + threadIdx.x;  // past the last whole vector
  if (kWidth > 1 && blockIdx.x == 0 && extent.rows == 1 && tail < extent.cols) {
    const double value = static_cast<double>(x.load_one(0, tail));
    total += kSquare ? value * value : value;
  }
  total = block_sum(total, shared_memory<double>());
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    result.store(total);
  } else {
    partials[blockIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kSumThreads) add_sums_kernel(const double* partials, int count, SumResult result) {
  double total = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSumThreads) total += partials[i];
  total = block_sum(total, shared_memory<double>());
  if (threadIdx.x == 0) result.store(total);
}

template <bool kSquare, typename View>
void launch_sum(cudaStream_t stream, View x, const Extent& extent, double* partials, const SumResult& result) {
  constexpr size_t kShared = kSumThreads / kWarp * sizeof(double);
  const int64_t tiles = extent.tiles(View::kWidth, kSumTile);
  const int blocks = static_cast<int>(std::clamp<int64_t>(tiles, 1, kMaxSumBlocks));
  launch("sum", sum_kernel<kSquare, View>,
         {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(kSumThreads),
          .shared_bytes = kShared,
          .stream = stream},
         x, extent, tiles, partials, result);
  if (blocks == 1) return;
  launch("add_sums", add_sums_kernel, {.block = dim3(kSumThreads), .shared_bytes = kShared, .stream = stream}, partials,
         blocks, result);
}

template <bool kSquare>
void sum_elements(cudaStream_t stream, const Tensor& x, double* partials, const SumResult& result) {
  const Extent extent = common_extent(x);
  dispatch(x.dtype, [&]<typename T>() {
    launch_sum<kSquare>(stream, vector_view<T, Pack<T>::kSize>(x), extent, partials, result);
  });
}

// ---- sums of columns

// partials[chunk, column] = sum of a chunk's rows. Block (x, y): columns from x * kColumnTile on, chunk y.
template <typename T>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    column_sums_kernel(float* partials, VectorView<T, kOctet> in, int64_t rows, int64_t cols, int64_t chunk) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kColumnTile, column = tile + lane * kOctet;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  float sums[kOctet] = {};
  for (int64_t row = begin + warp; row < end && column < cols; row += kColumnStep) {
    Vector<T, kOctet> raw[kColumnUnroll];
#pragma unroll
    for (int u = 0; u < kColumnUnroll; ++u) {
      if (row + u * kColumnWarps < end) raw[u] = in.load_again(row + u * kColumnWarps, column);
    }
#pragma unroll
    for (int u = 0; u < kColumnUnroll; ++u) {
      if (row + u * kColumnWarps >= end) continue;
      float values[kOctet];
      unpack(raw[u], values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sums[i] += values[i];
    }
  }
  float* const shared = shared_memory<float>();  // [kColumnWarps, kColumnTile]
#pragma unroll
  for (int i = 0; i < kOctet; ++i) shared[warp * kColumnTile + lane * kOctet + i] = sums[i];
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < kColumnTile && tile + j < cols; j += kColumnWarps * kWarp) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) sum += shared[w * kColumnTile + j];
    partials[blockIdx.y * cols + tile + j] = sum;
  }
}

// A warp takes a range of the chunks for 32 columns; the warps' sums are added in order.
__global__ void __launch_bounds__(kPartialWarps* kWarp)
    add_partials_kernel(AnyView first, AnyView second, const float* partials, int chunks, int64_t cols,
                        int64_t all_cols, bool accumulate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int range = (chunks + kPartialWarps - 1) / kPartialWarps;
  const int end = chunks < (warp + 1) * range ? chunks : (warp + 1) * range;
  float sum = 0;
  for (int chunk = warp * range; chunk < end && column < all_cols; chunk += kPartialUnroll) {
    float values[kPartialUnroll];
#pragma unroll
    for (int u = 0; u < kPartialUnroll; ++u) {
      values[u] = chunk + u < end ? partials[(chunk + u) * all_cols + column] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kPartialUnroll; ++u) sum += values[u];
  }
  float* const shared = shared_memory<float>();  // [kPartialWarps, 32]
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= all_cols) return;
  for (int w = 1; w < kPartialWarps; ++w) sum += shared[w * kWarp + lane];
  const AnyView out = column < cols ? first : second;
  const int64_t at = column < cols ? column : column - cols;
  out.store_one(0, at, accumulate ? sum + out.load_one(0, at) : sum);
}

}  // namespace

void add_column_partials(const char* name, cudaStream_t stream, const Tensor& first, const Tensor& second,
                         const float* partials, int64_t chunks, bool accumulate) {
  const int64_t cols = first.elements(), all_cols = cols + (second.empty() ? 0 : second.elements());
  launch(name, add_partials_kernel,
         {.grid = dim3(static_cast<unsigned>((all_cols + kWarp - 1) / kWarp)),
          .block = dim3(kPartialWarps * kWarp),
          .shared_bytes = kPartialWarps * kWarp * sizeof(float),
          .stream = stream},
         any_view(first), any_view(second.empty() ? first : second), partials, static_cast<int>(chunks), cols, all_cols,
         accumulate);
}

void CudaBackend::sum_squares(Tensor out, Tensor x, bool accumulate) {
  const Timed timed(*this, "sum_squares", 0, static_cast<double>(x.bytes()));
  require(out.dtype == DType::kF32, "sum: the result is fp32");
  sum_elements<true>(stream_, x, scratch<double>(kMaxSumBlocks * sizeof(double)), {out.as<float>(), 1.0f, accumulate});
}

void CudaBackend::sum(Tensor out, Tensor x, float factor, bool accumulate) {
  const Timed timed(*this, "sum", 0, static_cast<double>(x.bytes()));
  require(out.dtype == DType::kF32, "sum: the result is fp32");
  sum_elements<false>(stream_, x, scratch<double>(kMaxSumBlocks * sizeof(double)),
                      {out.as<float>(), factor, accumulate});
}

void CudaBackend::bias_backward(Tensor dbias, Tensor dout, bool accumulate) {
  check_bias_backward(dbias, dout);
  const int64_t rows = dout.rows(), cols = dout.cols();
  const Timed timed(*this, "bias_backward", 0, static_cast<double>(dout.bytes()));
  const RowChunks chunks = row_chunks(rows, kMaxBiasChunks, kColumnStep);
  float* const partials = scratch<float>(static_cast<size_t>(chunks.count * cols) * sizeof(float));
  require_octet_rows(dout);
  if (rows > 0) {
    dispatch(dout.dtype, [&]<typename T>() {
      launch("bias_backward", column_sums_kernel<T>,
             {.grid = dim3(static_cast<unsigned>((cols + kColumnTile - 1) / kColumnTile),
                           static_cast<unsigned>(chunks.count)),
              .block = dim3(kColumnWarps * kWarp),
              .shared_bytes = kColumnWarps * kColumnTile * sizeof(float),
              .stream = stream_},
             partials, vector_view<T, kOctet>(dout), rows, cols, chunks.rows);
    });
  }
  add_column_partials("bias_backward: partials", stream_, dbias, {}, partials, chunks.count, accumulate);
}
