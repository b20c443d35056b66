// orthonormalize.cu: makes the rows of a projection orthonormal, P <- L^-1 P with P P^T = L L^T. Compute-bound in fp64
// but for the Gram matrix: r^3 / 3 operations for the factor, r^2 d for the triangular solve.
//
// All of it works on tiles of 32 x 32 doubles in shared memory, and every product of tiles has the form A B^T. The
// factor is made panel by panel, one launch each, with as many thread blocks as there are tiles left: a launch
// subtracts the previous panel's product from its tile, and the tiles of its own panel go on to become part of L. For
// that each of them factors the panel's diagonal tile again by itself, which costs less than waiting for another one.
// What orders the whole is r pivots one after another, 32 in a launch of about 10 microseconds.
//
// The diagonal tiles of L are needed only as inverses; those live in the workspace, so that within a launch nobody
// writes the diagonal tile that all the others read.
#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/dispatch.h"
#include "kernels/operands.h"

namespace {

constexpr int kTile = kOrthonormalizeTile;
constexpr int kPitch = kTile + 1;  // of a tile in shared memory: rows start in different banks
constexpr int kTileSize = kTile * kPitch;
constexpr int kThreads = 256;
constexpr size_t kTileBytes = kTileSize * sizeof(double);
constexpr int kPanelCols = 8;                     // columns of P that a thread block solves, or fewer
constexpr size_t kPanelBytes = size_t{80} << 10;  // shared memory for them

// What the launches hand on beside the factor: the inverses of its diagonal tiles, and whether a pivot was too small.
struct FactorScratch {
  double* inverses;  // [r / 32 rounded up][32][32]
  uint32_t* failed;
};

// The r x r matrix under the factorization; only tiles on and below the diagonal are ever used.
struct Square {
  double* data;
  int64_t r;
};

// ---- tiles in shared memory, by all threads of a block; a barrier belongs between a load and a use

// Tile (row, column) of a; the identity where the matrix ends, so that every tile is whole.
__device__ inline void load_tile(double* tile, const Square& a, int64_t row, int64_t column) {
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
    const int64_t i = row * kTile + e / kTile, j = column * kTile + e % kTile;
    const bool inside = i < a.r && j < a.r;
    tile[e / kTile * kPitch + e % kTile] = inside ? a.data[i * a.r + j] : i == j ? 1.0 : 0.0;
  }
}

__device__ inline void store_tile(const Square& a, int64_t row, int64_t column, const double* tile) {
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
    const int64_t i = row * kTile + e / kTile, j = column * kTile + e % kTile;
    if (i < a.r && j < a.r) a.data[i * a.r + j] = tile[e / kTile * kPitch + e % kTile];
  }
}

// c (+)= sign * a b^T, four elements a thread. c is not a or b.
__device__ inline void multiply_tiles(double* c, const double* a, const double* b, double sign, bool accumulate) {
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  double sum[2][2] = {};
#pragma unroll 8
  for (int k = 0; k < kTile; ++k) {
    const double a0 = a[i * kPitch + k], a1 = a[(i + 16) * kPitch + k];
    const double b0 = b[j * kPitch + k], b1 = b[(j + 16) * kPitch + k];
    sum[0][0] = fma(a0, b0, sum[0][0]);
    sum[0][1] = fma(a0, b1, sum[0][1]);
    sum[1][0] = fma(a1, b0, sum[1][0]);
    sum[1][1] = fma(a1, b1, sum[1][1]);
  }
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      double& out = c[(i + 16 * p) * kPitch + j + 16 * q];
      out = sign * sum[p][q] + (accumulate ? out : 0.0);
    }
  }
}

// From a symmetric tile s (lower triangle): inverse <- L^-1 with s = L L^T, by elimination of s and the identity
// together. s keeps the squares of the pivots on its diagonal. Ends with a barrier.
__device__ inline void invert_factor(double* inverse, double* s) {
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads)
    inverse[e / kTile * kPitch + e % kTile] = e / kTile == e % kTile ? 1.0 : 0.0;
  const int i = threadIdx.x / 8;
  for (int j = 0; j + 1 < kTile; ++j) {
    __syncthreads();
    if (i <= j) continue;
    const double f = s[i * kPitch + j] / s[j * kPitch + j];
    // Columns up to j of the identity side change, columns past j of the matrix; s is symmetric: s[j][c] = s[c][j].
    for (int c = threadIdx.x % 8; c <= i; c += 8) {
      if (c <= j) {
        inverse[i * kPitch + c] -= f * inverse[j * kPitch + c];
      } else {
        s[i * kPitch + c] -= f * s[c * kPitch + j];
      }
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads)
    inverse[e / kTile * kPitch + e % kTile] /= sqrt(s[e / kTile * kPitch + e / kTile]);
  __syncthreads();
}

// ---- the Gram matrix

// The lower tiles of p p^T in fp64.
template <typename T>
__global__ void __launch_bounds__(kThreads) gram_kernel(Square gram, const T* p, int64_t d) {
  const int64_t row = blockIdx.x, column = blockIdx.y;
  if (column > row) return;
  double* const a = shared_memory<double>();
  double *const b = a + kTileSize, *const c = b + kTileSize;
  for (int64_t begin = 0; begin < d; begin += kTile) {
    __syncthreads();
    for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
      const int64_t i = e / kTile, j = begin + e % kTile;
      const int64_t row_a = row * kTile + i, row_b = column * kTile + i;
      const int at = e / kTile * kPitch + e % kTile;
      a[at] = row_a < gram.r && j < d ? static_cast<double>(to_float(p[row_a * d + j])) : 0.0;
      b[at] = row_b < gram.r && j < d ? static_cast<double>(to_float(p[row_b * d + j])) : 0.0;
    }
    __syncthreads();
    multiply_tiles(c, a, b, 1.0, begin > 0);
  }
  __syncthreads();
  store_tile(gram, row, column, c);
}

// Row i of a Gram matrix in fp32, in the second half of row i of the square, becomes row i in fp64. What is written in
// one turn lies on numbers read in an earlier one.
__global__ void __launch_bounds__(kThreads) widen_rows_kernel(Square square) {
  double* const row = square.data + static_cast<int64_t>(blockIdx.x) * square.r;
  for (int64_t begin = 0; begin < square.r; begin += kThreads) {
    const int64_t j = begin + threadIdx.x;
    float narrow = 0.0f;
    if (j < square.r)
      memcpy(&narrow, reinterpret_cast<const char*>(row) + (square.r + j) * sizeof(float), sizeof narrow);
    __syncthreads();
    if (j < square.r) row[j] = narrow;
  }
}

// ---- Cholesky

// Panel k. Thread block (x, y) has tile (k + x, k + y), y <= x: it subtracts the product of panel k - 1; where y = 0 it
// goes on to L: the tile times the transposed inverse of the diagonal tile's factor.
__global__ void __launch_bounds__(kThreads)
    factor_panel_kernel(Square a, int64_t k, double precision, FactorScratch scratch, StepScalars* scalars) {
  const int64_t row = k + blockIdx.x, column = k + blockIdx.y;
  if (column > row) return;
  double* const tile = shared_memory<double>();
  double *const left = tile + kTileSize, *const right = left + kTileSize, *const diagonal = right + kTileSize;
  const bool in_panel = column == k;
  load_tile(tile, a, row, column);
  if (in_panel) load_tile(diagonal, a, k, k);
  if (k > 0) {
    load_tile(left, a, row, k - 1);
    load_tile(right, a, column, k - 1);
    __syncthreads();
    multiply_tiles(tile, left, right, -1.0, true);
    if (in_panel) multiply_tiles(diagonal, right, right, -1.0, true);
  }
  __syncthreads();
  if (!in_panel) {
    store_tile(a, row, column, tile);
    return;
  }
  double *const inverse = left, *const result = right;
  invert_factor(inverse, diagonal);
  if (row > k) {
    multiply_tiles(result, tile, inverse, 1.0, false);
    __syncthreads();
    store_tile(a, row, column, result);
    return;
  }
  double* const kept = scratch.inverses + k * kTile * kTile;
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) kept[e] = inverse[e / kTile * kPitch + e % kTile];
  if (threadIdx.x != 0) return;
  const double smallest = precision * a.data[0];  // diagonal tiles are never written: still the first pivot
  uint32_t failed = k > 0 ? *scratch.failed : 0;
  for (int i = 0; i < kTile && k * kTile + i < a.r; ++i)
    if (!(diagonal[i * kPitch + i] > smallest)) failed = 1;
  *scratch.failed = failed;
  if (failed) scalars->gate = 0;
}

// ---- the solve

// kWidth columns of p a thread block (1, 2, 4 or 8): forward substitution, with the columns in shared memory in fp64
// all the time. A thread has one element of a tile of rows; where there are fewer columns than 8, neighbours share the
// sum. Afterwards p = L^-1 p, or unchanged after a failure.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) solve_kernel(T* p, int64_t d, Square factor, FactorScratch scratch) {
  if (*scratch.failed) return;
  double* const tile = shared_memory<double>();
  double* const sums = tile + kTileSize;        // [32][kWidth]
  double* const x = sums + kTile * kPanelCols;  // [r rounded up to 32][kWidth]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWidth;
  const int64_t tiles = (factor.r + kTile - 1) / kTile;
  for (int64_t e = threadIdx.x; e < tiles * kTile * kWidth; e += kThreads) {
    const int64_t i = e / kWidth, j = first + e % kWidth;
    x[e] = i < factor.r && j < d ? static_cast<double>(to_float(p[i * d + j])) : 0.0;
  }
  const int i = threadIdx.x / 8, column = threadIdx.x % 8 % kWidth;
  constexpr int kParts = 8 / kWidth;
  const int part = threadIdx.x % 8 / kWidth;
  // The sum over k of tile[i][k] from[k][column], in all lanes of a row that share it.
  const auto row_sum = [&](const double* from) {
    double sum = 0;
#pragma unroll 8
    for (int k = 0; k < kTile; k += kParts)
      sum = fma(tile[i * kPitch + k + part], from[(k + part) * kWidth + column], sum);
#pragma unroll
    for (int offset = 4; offset >= kWidth; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    return sum;
  };
  for (int64_t row = 0; row < tiles; ++row) {
    double sum = 0;
    for (int64_t k = 0; k < row; ++k) {
      __syncthreads();  // the last use of the tile is over
      load_tile(tile, factor, row, k);
      __syncthreads();
      sum += row_sum(x + k * kTile * kWidth);
    }
    __syncthreads();
    const double* const inverse = scratch.inverses + row * kTile * kTile;
    for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) tile[e / kTile * kPitch + e % kTile] = inverse[e];
    if (part == 0) sums[i * kWidth + column] = x[(row * kTile + i) * kWidth + column] - sum;
    __syncthreads();
    const double solved = row_sum(sums);
    if (part == 0) x[(row * kTile + i) * kWidth + column] = solved;
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < factor.r * kWidth; e += kThreads) {
    const int64_t i = e / kWidth, j = first + e % kWidth;
    if (j < d) p[i * d + j] = from_float<T>(static_cast<float>(x[e]));
  }
}

}  // namespace

void CudaBackend::orthonormalize_rows(Tensor p, void* scratch_memory, StepScalars* scalars) {
  check_orthonormalize_rows(p);
  const int64_t r = p.rows(), d = p.cols();
  int64_t width = kPanelCols;
  const int64_t tiles = divide_up(r, kTile);
  while (width > 1 && static_cast<size_t>(tiles * kTile * width) * sizeof(double) > kPanelBytes) width /= 2;
  const size_t panel_bytes = static_cast<size_t>(tiles * kTile * width) * sizeof(double);
  require(panel_bytes <= kPanelBytes, "orthonormalize_rows: too many rows");

  const bool fp64 = r * 10 > d * 8;
  const Square square = {static_cast<double*>(scratch_memory), r};
  if (!fp64) {
    // The fp32 Gram matrix, each row in the second half of its row of doubles.
    Tensor narrow = Tensor::of(static_cast<float*>(scratch_memory) + r, DType::kF32, {r, r});
    narrow.stride[0] = 2 * r;
    matmul(narrow, p, p, {.transpose_b = true});
  }
  const Timed timed(*this, "orthonormalize_rows", 2.0 * r * r * d + 1.0 * r * r * r / 3,
                    2.0 * static_cast<double>(p.bytes()));
  const unsigned grid = static_cast<unsigned>(tiles);
  if (fp64) {
    dispatch(p.dtype, [&]<typename T>() {
      launch("gram", gram_kernel<T>,
             {.grid = dim3(grid, grid), .block = kThreads, .shared_bytes = 3 * kTileBytes, .stream = stream_}, square,
             p.as<T>(), d);
    });
  } else {
    launch("widen_rows", widen_rows_kernel,
           {.grid = dim3(static_cast<unsigned>(r)), .block = kThreads, .stream = stream_}, square);
  }

  FactorScratch kept;
  kept.inverses = scratch<double>(orthonormalize_scratch_bytes(r));
  kept.failed = reinterpret_cast<uint32_t*>(kept.inverses + tiles * kTile * kTile);
  for (int64_t k = 0; k < tiles; ++k) {
    const unsigned left = static_cast<unsigned>(tiles - k);
    launch("factor_panel", factor_panel_kernel,
           {.grid = dim3(left, left), .block = kThreads, .shared_bytes = 4 * kTileBytes, .stream = stream_}, square, k,
           fp64 ? 1e-13 : 1e-6, kept, scalars);
  }
  const auto solve = [&]<typename T, int kWidth>() {
    launch("solve", solve_kernel<T, kWidth>,
           {.grid = dim3(static_cast<unsigned>(divide_up(d, kWidth))),
            .block = kThreads,
            .shared_bytes = kTileBytes + kTile * kPanelCols * sizeof(double) + panel_bytes,
            .stream = stream_},
           p.as<T>(), d, square, kept);
  };
  dispatch(p.dtype, [&]<typename T>() {
    switch (width) {
      case 8: solve.template operator()<T, 8>(); return;
      case 4: solve.template operator()<T, 4>(); return;
      case 2: solve.template operator()<T, 2>(); return;
      default: solve.template operator()<T, 1>(); return;
    }
  });
}
