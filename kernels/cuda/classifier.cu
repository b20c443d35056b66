// classifier.cu: softmax and cross-entropy over the vocabulary, loss and gradient.
// Memory-bound: a row of logits is read once and, as its gradient, written once. A block owns a row: one pass keeps a
// running maximum and the sum of the exponentials relative to it in every thread; the block combines them; a second
// pass writes the gradient. Between the passes the row waits in shared memory, where two rows of GPT-2's vocabulary in
// bf16 fit into an SM of Hopper; a longer one is read again, from the L2 cache.
#include <algorithm>
#include <cfloat>
#include <climits>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/views.cuh"
#include "kernels/operands.h"

namespace {

constexpr int kMaxThreads = 512, kUnroll = 4;
constexpr size_t kReduceBytes = 256;             // shared memory for the block's reductions, before the row
constexpr size_t kHalfAnSm = size_t{113} << 10;  // of Hopper's shared memory, what one of two blocks can have

struct Rows {
  const int32_t* targets;
  float* losses;
  float* lse;  // or null
  int cols, vocabulary;
  float scale;
  bool write_gradient, keep;
};

// e^x; the bf16 kernel has no time for the exact one, and no use.
template <typename T>
__device__ inline float exponential(float x) {
  if constexpr (sizeof(T) == 2) return exp2_approximate(x * 1.44269504f);
  return expf(x);
}

// The sum of e^(x - maximum) over what was seen so far. The maximum starts at a finite number: logits may be -infinity.
struct RunningSum {
  float maximum = -FLT_MAX, sum = 0;
};

template <typename T, int kCount>
__device__ inline void add_logits(RunningSum& running, const float (&values)[kCount]) {
  float maximum = running.maximum;
#pragma unroll
  for (int i = 0; i < kCount; ++i) maximum = fmaxf(maximum, values[i]);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += exponential<T>(values[i] - maximum);
  running.sum = fmaf(running.sum, exponential<T>(running.maximum - maximum), sum);
  running.maximum = maximum;
}

// The first `used` values are logits.
template <int kCount>
__device__ inline void replace_padding(float (&values)[kCount], int used, float replacement) {
  if (used >= kCount) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = i < used ? values[i] : replacement;
}

template <typename T>
using Logits = VectorView<T, Pack<T>::kSize>;

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2) classifier_kernel(Logits<T> logits, Rows p) {
  constexpr int kWidth = Logits<T>::kWidth;
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int groups = p.cols / kWidth, used_groups = (p.vocabulary + kWidth - 1) / kWidth;
  const int32_t target = p.targets[row];
  if (target < 0) {
    const float zeros[kWidth] = {};
    for (int i = thread; i < groups && p.write_gradient; i += threads) logits.store(row, i * kWidth, zeros);
    if (thread == 0) p.losses[row] = 0;
    if (thread == 0 && p.lse) p.lse[row] = 0;
    return;
  }
  using Raw = typename Logits<T>::Raw;
  float* const reduce = shared_memory<float>();
  T* const kept = reinterpret_cast<T*>(shared_memory<char>() + kReduceBytes);
  const float target_logit = logits.load_one(row, target);  // before the gradient takes its place

  RunningSum running;
  for (int first = thread; first < used_groups; first += threads * kUnroll) {
    Raw raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * threads;
      if (i < used_groups) raw[u] = logits.load_again(row, i * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * threads;
      if (i >= used_groups) continue;
      if (p.keep) store128_shared(kept + i * kWidth, raw[u].packs[0]);
      float values[kWidth];
      unpack(raw[u], values);
      replace_padding(values, p.vocabulary - i * kWidth, -INFINITY);
      add_logits<T>(running, values);
    }
  }
  const float maximum = block_max(running.maximum, reduce);
  const float sum = block_sum(running.sum * exponential<T>(running.maximum - maximum), reduce);
  if (thread == 0) p.losses[row] = logf(sum) - (target_logit - maximum);
  if (thread == 0 && p.lse) p.lse[row] = maximum + logf(sum);
  if (!p.write_gradient) return;

  const float factor = p.scale / sum;
  for (int first = thread; first < groups; first += threads * kUnroll) {
    Raw raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * threads;
      if (i >= used_groups) continue;
      raw[u] = p.keep ? load_vector<kWidth>(kept + i * kWidth) : logits.load(row, i * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * threads;
      if (i >= groups) continue;
      float values[kWidth] = {};
      if (i < used_groups) unpack(raw[u], values);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = exponential<T>(values[j] - maximum) * factor;
      replace_padding(values, p.vocabulary - i * kWidth, 0.0f);
      logits.store(row, i * kWidth, values);
      if (i == target / kWidth) {  // by the thread that has just written there
        logits.store_one(row, target, p.scale * (exponential<T>(target_logit - maximum) / sum - 1.0f));
      }
    }
  }
}

constexpr int kGradientThreads = 256, kGradientUnroll = 4;

struct Columns {
  const int32_t* targets;
  const float* lse;
  uint32_t row_groups, total_groups;  // vectors of a row and of all rows
  int cols, first, vocabulary;
  float scale;
  bool octet_rows;  // which the last block of a vocabulary may not have
};

// One read, one write: a thread has kGradientUnroll vectors on their way, a whole grid apart.
template <typename T>
__global__ void __launch_bounds__(kGradientThreads) classifier_gradient_kernel(Logits<T> logits, Columns p) {
  constexpr int kWidth = Logits<T>::kWidth;
  const uint32_t thread = blockIdx.x * kGradientThreads + threadIdx.x, threads = gridDim.x * kGradientThreads;
  uint32_t rows[kGradientUnroll], columns[kGradientUnroll];
  typename Logits<T>::Raw raw[kGradientUnroll];
#pragma unroll
  for (int u = 0; u < kGradientUnroll; ++u) {
    const uint32_t group = thread + u * threads;
    rows[u] = group / p.row_groups;
    columns[u] = (group - rows[u] * p.row_groups) * kWidth;
    if (p.octet_rows && group < p.total_groups) raw[u] = logits.load(rows[u], columns[u]);
  }
#pragma unroll
  for (int u = 0; u < kGradientUnroll; ++u) {
    if (thread + u * threads >= p.total_groups) continue;
    const int32_t target = p.targets[rows[u]];
    const float lse = p.lse[rows[u]];
    const int column = p.first + static_cast<int>(columns[u]);
    const int left = p.cols - static_cast<int>(columns[u]);
    float values[kWidth] = {};
    if (p.octet_rows) {
      unpack(raw[u], values);
    } else {
      for (int j = 0; j < kWidth && j < left; ++j) values[j] = logits.load_one(rows[u], columns[u] + j);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      values[j] = p.scale * (exponential<T>(values[j] - lse) - (column + j == target ? 1.0f : 0.0f));
    replace_padding(values, target < 0 ? 0 : p.vocabulary - column, 0.0f);
    if (p.octet_rows) {
      logits.store(rows[u], columns[u], values);
    } else {
      for (int j = 0; j < kWidth && j < left; ++j) logits.store_one(rows[u], columns[u] + j, values[j]);
    }
  }
}

}  // namespace

void CudaBackend::classifier(Tensor losses, Tensor logits, Tensor targets, int64_t vocabulary, float gradient_scale,
                             bool write_gradient, Tensor lse) {
  check_classifier(losses, logits, targets, vocabulary, lse);
  const int64_t rows = logits.rows(), cols = logits.cols();
  require(cols < INT_MAX / 2, "classifier: too many columns");
  const Timed timed(*this, "classifier", 0, static_cast<double>(logits.bytes()) * (write_gradient ? 2 : 1));
  if (rows == 0) return;
  require_octet_rows(logits);
  const size_t row_bytes = static_cast<size_t>(cols) * dtype_size(logits.dtype);
  dispatch(logits.dtype, [&]<typename T>() {
    // Data center Hopper and Blackwell; elsewhere an SM has less, and what it has serves better as a cache.
    const size_t room = architecture_ >= 90 && architecture_ < 120 && !plain_classifier_ ? kHalfAnSm : 0;
    const bool keep = write_gradient && kReduceBytes + row_bytes <= room;
    const Rows p = {targets.as<const int32_t>(),  losses.as<float>(), lse.as<float>(), static_cast<int>(cols),
                    static_cast<int>(vocabulary), gradient_scale,     write_gradient,  keep};
    // Of a small vocabulary no more warps than have a vector to read.
    const int64_t warps = (cols + Logits<T>::kWidth * kWarp - 1) / (Logits<T>::kWidth * kWarp);
    const LaunchShape shape = {.grid = dim3(static_cast<unsigned>(rows)),
                               .block = dim3(static_cast<unsigned>(std::min<int64_t>(warps * kWarp, kMaxThreads))),
                               .shared_bytes = kReduceBytes + (keep ? row_bytes : 0),
                               .stream = stream_};
    launch("classifier", classifier_kernel<T>, shape, vector_view<T, Pack<T>::kSize>(logits), p);
  });
}

void CudaBackend::classifier_gradient(Tensor logits, Tensor targets, Tensor lse, int64_t first, int64_t vocabulary,
                                      float gradient_scale) {
  check_classifier_gradient(logits, targets, lse, first, vocabulary);
  const int64_t rows = logits.rows(), cols = logits.cols();
  require(first + cols < INT_MAX / 2 && vocabulary < INT_MAX / 2, "classifier_gradient: too many columns");
  require(logits.elements() < INT_MAX, "classifier_gradient: too many elements");
  const Timed timed(*this, "classifier_gradient", 0, 2.0 * static_cast<double>(logits.bytes()));
  if (logits.elements() == 0) return;
  dispatch(logits.dtype, [&]<typename T>() {
    constexpr int64_t kWidth = Logits<T>::kWidth;
    const int64_t row_groups = (cols + kWidth - 1) / kWidth, groups = rows * row_groups;
    constexpr int64_t kBlockGroups = kGradientThreads * kGradientUnroll;
    const Columns p = {targets.as<const int32_t>(),   lse.as<const float>(),  static_cast<uint32_t>(row_groups),
                       static_cast<uint32_t>(groups), static_cast<int>(cols), static_cast<int>(first),
                       static_cast<int>(vocabulary),  gradient_scale,         has_octet_rows(logits)};
    launch("classifier_gradient", classifier_gradient_kernel<T>,
           {.grid = dim3(static_cast<unsigned>((groups + kBlockGroups - 1) / kBlockGroups)),
            .block = dim3(kGradientThreads),
            .stream = stream_},
           vector_view<T, Pack<T>::kSize>(logits), p);
  });
}
