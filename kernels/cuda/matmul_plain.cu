// matmul_plain.cu: a tiled matrix product without tensor cores. Compute-bound: 2 M N K operations in fp32.
//
// A block computes 64 x 64 of the result, a thread 4 x 4 of it, in steps of 16 along K. The two panels of a step are
// widened to fp32 in shared memory, depth first, so that a thread reads its four rows and its four columns with one
// 16-byte load each; the panels of the next step are on their way into registers meanwhile. Sums go along K in
// ascending order and nothing is split, so the result depends on nothing but the inputs. dtypes and transposition are
// looked at when an element is loaded, the same way by all threads: one kernel instead of sixteen, for a rare case.

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/views.cuh"

namespace {

constexpr int kTile = 64;   // rows and columns of a block's result
constexpr int kDepth = 16;  // of K in one step
constexpr int kSide = 4;    // rows and columns of a thread's result
constexpr int kThreads = (kTile / kSide) * (kTile / kSide);
constexpr int kLoads = kTile * kDepth / kThreads;  // elements of one panel that a thread brings
constexpr int kPitch = kTile + 4;                  // floats from one depth to the next: 16-byte aligned, few conflicts

struct PlainProduct {
  AnyView out, a, b, bias;
  int64_t m, n, k;
  bool transpose_a, transpose_b, accumulate;
  float alpha;
};

// Where this thread's `i`-th element of a panel is: across (a row of op(a), a column of op(b)) and along K.
// Neighbouring threads take neighbours in memory.
struct Place {
  int across, depth;
};

__device__ inline Place place(int i, bool depth_is_contiguous) {
  const int index = static_cast<int>(threadIdx.x) + i * kThreads;
  return depth_is_contiguous ? Place{index / kDepth, index % kDepth} : Place{index % kTile, index / kTile};
}

// One panel into registers: `across` x `depth` of a matrix that is [across, K] in memory, or [K, across]. Zeros
// outside.
__device__ inline void fetch(float (&panel)[kLoads], const AnyView& matrix, bool depth_is_contiguous, int64_t across,
                             int64_t end_across, int64_t depth, int64_t end_depth) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const Place at = place(i, depth_is_contiguous);
    const int64_t x = across + at.across, k = depth + at.depth;
    panel[i] = 0.0f;
    if (x < end_across && k < end_depth) panel[i] = depth_is_contiguous ? matrix.load_one(x, k) : matrix.load_one(k, x);
  }
}

__device__ inline void put(float* shared, const float (&panel)[kLoads], bool depth_is_contiguous) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const Place at = place(i, depth_is_contiguous);
    shared[at.depth * kPitch + at.across] = panel[i];
  }
}

__global__ void __launch_bounds__(kThreads) matmul_plain_kernel(PlainProduct p) {
  float* const panel_a = shared_memory<float>();
  float* const panel_b = panel_a + kDepth * kPitch;
  const int64_t tiles_across = (p.n + kTile - 1) / kTile;
  const int64_t row = static_cast<int64_t>(blockIdx.x) / tiles_across * kTile;
  const int64_t col = static_cast<int64_t>(blockIdx.x) % tiles_across * kTile;
  const int own_row = static_cast<int>(threadIdx.x) / (kTile / kSide) * kSide;
  const int own_col = static_cast<int>(threadIdx.x) % (kTile / kSide) * kSide;

  float sums[kSide][kSide] = {};
  float next_a[kLoads], next_b[kLoads];
  fetch(next_a, p.a, !p.transpose_a, row, p.m, 0, p.k);
  fetch(next_b, p.b, p.transpose_b, col, p.n, 0, p.k);
  for (int64_t depth = 0; depth < p.k; depth += kDepth) {
    put(panel_a, next_a, !p.transpose_a);
    put(panel_b, next_b, p.transpose_b);
    __syncthreads();
    fetch(next_a, p.a, !p.transpose_a, row, p.m, depth + kDepth, p.k);
    fetch(next_b, p.b, p.transpose_b, col, p.n, depth + kDepth, p.k);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const Pack<float> a = load128(panel_a + k * kPitch + own_row);
      const Pack<float> b = load128(panel_b + k * kPitch + own_col);
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) sums[i][j] = fmaf(a.v[i], b.v[j], sums[i][j]);
      }
    }
    __syncthreads();  // before the panels are overwritten
  }

#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      const int64_t r = row + own_row + i, c = col + own_col + j;
      if (r >= p.m || c >= p.n) continue;
      float value = p.alpha * sums[i][j];
      if (p.accumulate) value += p.out.load_one(r, c);
      if (p.bias.data) value += p.bias.load_one(0, c);
      p.out.store_one(r, c, value);
    }
  }
}

}  // namespace

void matmul_plain(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, cudaStream_t stream) {
  const PlainProduct product = {.out = any_view(out),
                                .a = any_view(a),
                                .b = any_view(b),
                                .bias = options.bias ? any_view(options.bias) : AnyView{},
                                .m = out.rows(),
                                .n = out.cols(),
                                .k = options.transpose_a ? a.rows() : a.cols(),
                                .transpose_a = options.transpose_a,
                                .transpose_b = options.transpose_b,
                                .accumulate = options.accumulate,
                                .alpha = options.alpha};
  const int64_t tiles = ((product.m + kTile - 1) / kTile) * ((product.n + kTile - 1) / kTile);
  require(tiles < (int64_t{1} << 31), "matmul: the result is too large");
  launch("matmul_plain", matmul_plain_kernel,
         {.grid = static_cast<unsigned>(tiles),
          .block = kThreads,
          .shared_bytes = 2 * kDepth * kPitch * sizeof(float),
          .stream = stream},
         product);
}
