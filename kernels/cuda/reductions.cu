// reductions.cu: sums of all elements and sums of columns. Memory-bound: each element is read once.
// Blocks leave partial sums in the workspace, which are added in order: of all elements (sum_order.cuh) by the last
// block, of columns by a second kernel; how a sum is cut depends on the shape alone. Sums of columns: a block owns a
// chunk of rows and as many columns as its 32 lanes load at once, a lane keeps its columns' sums in registers, and the
// warps' sums meet in shared memory.
#include <algorithm>

#include "kernels/cuda/arrivals.cuh"
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sum_order.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/operands.h"

namespace {

constexpr int kPartialWarps = 16, kPartialUnroll = 8;

// ---- sums of all elements

// Up to kMostTogether tensors, whose partial sums lie one after another.
struct SumParts {
  SumPart parts[kMostTogether];
  int count = 0;
};

struct SumResult {
  float* out;
  float factor;
  bool accumulate;

  __device__ void store(double sum) const { store_sum(out, static_cast<double>(factor) * sum, accumulate); }
};

template <bool kSquare, typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(SumParts all, double* partials, unsigned* arrived, SumResult result) {
  double* const shared = shared_memory<double>();
  int at = 0, first = 0;  // which tensor, and its first partial sum
  while (static_cast<int>(blockIdx.x) >= first + all.parts[at].blocks) first += all.parts[at++].blocks;
  const double total = partial_sum<kSquare, T>(all.parts[at], static_cast<int>(blockIdx.x) - first, shared);
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) result.store(total);
    return;
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
  if (!last_to_arrive(arrived, reinterpret_cast<unsigned*>(shared + kSumThreads / kWarp))) return;
  for (int i = 0; i < all.count; ++i) {
    const double sum = add_partial_sums(partials, all.parts[i].blocks, shared);
    partials += all.parts[i].blocks;
    if (threadIdx.x == 0) result.store(sum);
    result.accumulate = true;
  }
}

// Of tensors of one dtype, one after another.
template <bool kSquare>
void sum_together(cudaStream_t stream, std::span<const Tensor> tensors, double* partials, unsigned* arrived,
                  const SumResult& result) {
  SumParts all;
  int blocks = 0;
  for (const Tensor& x : tensors) {
    all.parts[all.count] = sum_part(x);
    blocks += all.parts[all.count++].blocks;
  }
  dispatch(tensors.front().dtype, [&]<typename T>() {
    launch("sum", sum_kernel<kSquare, T>,
           {.grid = dim3(static_cast<unsigned>(blocks)),
            .block = dim3(kSumThreads),
            .shared_bytes = kSumShared,
            .stream = stream},
           all, partials, arrived, result);
  });
}

// ---- sums of columns

template <typename T>
struct StoredRows {
  using Raw = Vector<T, kOctet>;

  VectorView<T, kOctet> rows;

  __device__ Raw load(int64_t row, int64_t column) const { return rows.load_again(row, column); }
  __device__ void numbers(const Raw& raw, int64_t, int64_t, float (&values)[kOctet]) const { unpack(raw, values); }
};

// Column by column, of the one or the other output.
struct PartialOutput {
  AnyView out;
  int chunks = 0;
};

// A warp takes a range of the chunks for 32 columns; the warps' sums are added in order.
__global__ void __launch_bounds__(kPartialWarps* kWarp)
    add_partials_kernel(PartialOutput first, PartialOutput second, const float* partials, int64_t cols,
                        int64_t all_cols, bool accumulate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int chunks = column < cols ? first.chunks : second.chunks;
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
  const AnyView out = column < cols ? first.out : second.out;
  const int64_t at = column < cols ? column : column - cols;
  out.store_one(0, at, accumulate ? sum + out.load_one(0, at) : sum);
}

}  // namespace

void add_column_partials(const char* name, cudaStream_t stream, const PartialColumns& first,
                         const PartialColumns& second, const float* partials, bool accumulate) {
  const auto output = [](const PartialColumns& columns) {
    return PartialOutput{any_view(columns.out), static_cast<int>(columns.chunks)};
  };
  const int64_t cols = first.out.elements(), all_cols = cols + second.out.elements();
  launch(name, add_partials_kernel,
         {.grid = dim3(static_cast<unsigned>((all_cols + kWarp - 1) / kWarp)),
          .block = dim3(kPartialWarps * kWarp),
          .shared_bytes = kPartialWarps * kWarp * sizeof(float),
          .stream = stream},
         output(first), output(second.out.empty() ? first : second), partials, cols, all_cols, accumulate);
}

void CudaBackend::sum_squares(Tensor out, std::span<const Tensor> tensors, bool accumulate) {
  const Timed timed(*this, "sum_squares", 0, total_bytes(tensors));
  require(out.dtype == DType::kF32, "sum: the result is fp32");
  while (!tensors.empty()) {
    size_t count = 1;
    while (count < std::min(tensors.size(), kMostTogether) && tensors[count].dtype == tensors[0].dtype) ++count;
    sum_together<true>(stream_, tensors.first(count),
                       scratch<double>(count * static_cast<size_t>(kMaxSumBlocks) * sizeof(double)), arrivals_,
                       {out.as<float>(), 1.0f, accumulate});
    tensors = tensors.subspan(count);
    accumulate = true;
  }
}

void CudaBackend::sum(Tensor out, Tensor x, float factor, bool accumulate) {
  const Timed timed(*this, "sum", 0, static_cast<double>(x.bytes()));
  require(out.dtype == DType::kF32, "sum: the result is fp32");
  sum_together<false>(stream_, {&x, 1}, scratch<double>(static_cast<size_t>(kMaxSumBlocks) * sizeof(double)), arrivals_,
                      {out.as<float>(), factor, accumulate});
}

void CudaBackend::bias_backward(Tensor dbias, Tensor dout, bool accumulate) {
  check_bias_backward(dbias, dout);
  const Timed timed(*this, "bias_backward", 0, static_cast<double>(dout.bytes()));
  require_octet_rows(dout);
  float* const partials = scratch<float>(static_cast<size_t>(kMaxBiasChunks * dout.cols()) * sizeof(float));
  dispatch(dout.dtype, [&]<typename T>() {
    sum_columns("bias_backward", stream_, dbias, StoredRows<T>{vector_view<T, kOctet>(dout)}, dout.rows(), partials,
                accumulate);
  });
}
