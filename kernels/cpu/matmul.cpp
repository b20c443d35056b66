// matmul.cpp: matrix products through gemm(). Compute-bound: 2 M N K operations.
//
// gemm() runs on one thread; OpenMP threads each take a slice of the result, which costs one extra packing of the
// operand they share. All fp32: it works on the tensors where they are. With bf16 anywhere the result is made in tiles:
// two bf16 operands are multiplied as they are where the processor is faster so; else panels are widened into a fixed
// per-thread scratch. A bf16 result is summed over all of K in an fp32 tile there and rounded once.
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/dispatch.h"
#include "kernels/operands.h"

namespace {

struct Block {
  int64_t begin, count;
};

// Piece `index` of `total` cut into `pieces` of nearly equal size, in multiples of 16 (a cache line of fp32).
Block piece(int64_t total, int64_t pieces, int64_t index) {
  const int64_t size = ((total + pieces - 1) / pieces + 15) / 16 * 16;
  const int64_t begin = std::min(total, size * index);
  return {begin, std::min(size, total - begin)};
}

struct Grid {
  int64_t rows = 1, cols = 1;
};

// One slice per thread: of all factorisations, the one whose slices have the shortest sides, which is what is packed.
Grid slices(int64_t m, int64_t n, int64_t k, int threads) {
  if (2.0 * m * n * k < 1e5) return {};
  Grid best = {threads, 1};
  for (int64_t rows = 1; rows <= threads; ++rows) {
    if (threads % rows != 0) continue;
    const Grid grid = {rows, threads / rows};
    auto side = [&](const Grid& g) { return piece(m, g.rows, 0).count + piece(n, g.cols, 0).count; };
    if (side(grid) < side(best)) best = grid;
  }
  return best;
}

// Tiles that fit the scratch, and enough of them to go round.
Grid tiles(int64_t m, int64_t n, int threads) {
  Grid grid = {(m + kTileRows - 1) / kTileRows, (n + kTileCols - 1) / kTileCols};
  while (grid.rows * grid.cols < 4 * threads && grid.rows * grid.cols % threads != 0 && m / grid.rows >= 128) {
    ++grid.rows;
  }
  return grid;
}

// One multiplication as its inner loops see it.
struct Product {
  Tensor out, a, b, bias;
  int64_t m, n, k;
  bool transpose_a, transpose_b, accumulate;
  float alpha;
};

// The part [row, row + rows) x [col, col + cols) of a matrix as fp32, where it is or widened into `panel`.
struct Panel {
  const float* data;
  int64_t stride;
};

Panel widen(const Tensor& matrix, int64_t row, int64_t col, int64_t rows, int64_t cols, float* panel) {
  if (matrix.dtype == DType::kF32) return {element<float>(matrix, row, col), matrix.leading_dimension()};
  for (int64_t i = 0; i < rows; ++i) {
    const bf16* in = element<bf16>(matrix, row + i, col);
    float* out = panel + i * cols;
    for (int64_t j = 0; j < cols; ++j) out[j] = to_float(in[j]);
  }
  return {panel, cols};
}

// c (+)= what the product is added to: the old result with `accumulate`, and the bias. Returns the factor on c that
// gemm needs: 0 when there was nothing to add.
template <typename Out>
float start_from(const Product& p, Block rows, Block cols, float* c, int64_t stride) {
  constexpr bool kInPlace = std::is_same_v<Out, float>;
  if (!p.accumulate && p.bias.empty()) return 0.0f;
  for (int64_t i = 0; i < rows.count; ++i) {
    const Out* old = element<Out>(p.out, rows.begin + i, cols.begin);
    float* row = c + i * stride;
    if (!p.accumulate) {
      std::fill(row, row + cols.count, 0.0f);
    } else if constexpr (!kInPlace) {
      for (int64_t j = 0; j < cols.count; ++j) row[j] = to_float(old[j]);
    }
    if (p.bias.empty()) continue;
    dispatch(p.bias.dtype, [&]<typename T>() {
      const T* bias = p.bias.as<T>() + cols.begin;
      for (int64_t j = 0; j < cols.count; ++j) row[j] += to_float(bias[j]);
    });
  }
  return 1.0f;
}

// One slice or tile of the result, in steps of `depth` along K, or with `in_bf16` by bf16 products along all of it.
void multiply_block(const Product& p, Block rows, Block cols, int64_t depth, bool in_bf16, float* scratch) {
  float* const panel_a = scratch + kTileRows * kTileCols;
  float* const panel_b = panel_a + kTileRows * kTileDepth;
  const bool in_place = p.out.dtype == DType::kF32;
  float* const c = in_place ? element<float>(p.out, rows.begin, cols.begin) : scratch;
  const int64_t stride = in_place ? p.out.leading_dimension() : cols.count;
  float beta = in_place ? start_from<float>(p, rows, cols, c, stride) : start_from<bf16>(p, rows, cols, c, stride);
  if (in_bf16) {
    const bf16* const a = p.transpose_a ? element<bf16>(p.a, 0, rows.begin) : element<bf16>(p.a, rows.begin, 0);
    const bf16* const b = p.transpose_b ? element<bf16>(p.b, cols.begin, 0) : element<bf16>(p.b, 0, cols.begin);
    constexpr size_t kRoom = (kMatmulScratchFloats - kTileRows * kTileCols) * sizeof(float);
    in_bf16 = gemm_bf16({rows.count, cols.count, p.k, p.transpose_a, p.transpose_b}, p.alpha, a,
                        p.a.leading_dimension(), b, p.b.leading_dimension(), beta, c, stride, panel_a, kRoom);
  }
  for (int64_t k = 0; k < p.k && !in_bf16; k += depth) {
    const int64_t steps = std::min(depth, p.k - k);
    const Panel a = p.transpose_a ? widen(p.a, k, rows.begin, steps, rows.count, panel_a)
                                  : widen(p.a, rows.begin, k, rows.count, steps, panel_a);
    const Panel b = p.transpose_b ? widen(p.b, cols.begin, k, cols.count, steps, panel_b)
                                  : widen(p.b, k, cols.begin, steps, cols.count, panel_b);
    gemm({rows.count, cols.count, steps, p.transpose_a, p.transpose_b}, p.alpha, a.data, a.stride, b.data, b.stride,
         beta, c, stride);
    beta = 1.0f;
  }
  if (in_place) return;
  for (int64_t i = 0; i < rows.count; ++i) {
    bf16* out = element<bf16>(p.out, rows.begin + i, cols.begin);
    const float* in = c + i * stride;
    for (int64_t j = 0; j < cols.count; ++j) out[j] = from_float<bf16>(in[j]);
  }
}

}  // namespace

void CpuBackend::matmul(Tensor out, Tensor a, Tensor b, const MatmulOptions& options) {
  const MatmulShape shape = check_matmul(out, a, b, options);
  const Product p{.out = out,
                  .a = a,
                  .b = b,
                  .bias = options.bias,
                  .m = shape.m,
                  .n = shape.n,
                  .k = shape.k,
                  .transpose_a = options.transpose_a,
                  .transpose_b = options.transpose_b,
                  .accumulate = options.accumulate,
                  .alpha = options.alpha};
  const Profiler::Scope scope(profiler, "matmul", 2.0 * p.m * p.n * p.k,
                              static_cast<double>(a.bytes() + b.bytes() + out.bytes() * (p.accumulate ? 2 : 1)));

  if (p.m == 1) {
    matmul_row(out, a, b, options, threads_);
    return;
  }
  const bool all_fp32 = out.dtype == DType::kF32 && a.dtype == DType::kF32 && b.dtype == DType::kF32;
  const Grid grid = all_fp32 ? slices(p.m, p.n, p.k, threads_) : tiles(p.m, p.n, threads_);
  const bool in_bf16 = a.dtype == DType::kBF16 && b.dtype == DType::kBF16 &&
                       (multiply_in_bf16_ ? *multiply_in_bf16_ : multiplies_bf16_faster());
  const size_t scratch_bytes = all_fp32 ? 0 : kMatmulScratchFloats * sizeof(float);
  thread_scratch(scratch_bytes);  // an error must not be thrown inside the parallel loop
  const int64_t blocks = grid.rows * grid.cols;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_) if (blocks > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const Block rows = piece(p.m, grid.rows, i / grid.cols), cols = piece(p.n, grid.cols, i % grid.cols);
    if (rows.count == 0 || cols.count == 0) continue;
    multiply_block(p, rows, cols, all_fp32 ? p.k : kTileDepth, in_bf16, thread_scratch(scratch_bytes));
  }
}
