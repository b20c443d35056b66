// tile_product.cpp: compute-bound, 2 m n k operations. A tile of C is kept in registers while k runs: for each step one
// number of every row on the left, kept for all columns, and a few registers of a row on the right. Compiled with
// -ffp-contract=fast (Makefile): a sum of products is made of fused multiply-adds where the machine has them.
#include "kernels/cpu/tile_product.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/cpu/lanes.h"

namespace {

// Rows of a tile, and its columns in Lanes: 24 or 12 registers of 32 or 16, which are as long as Lanes or half of that.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kColumns = 4;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kColumns = 2;
#else
constexpr int kColumns = 1;
#endif

// So many steps of a tile's columns stay in the first-level cache for all rows.
constexpr int64_t kDepth = 128;

using Kernel = void (*)(int64_t k, const LeftOperand& left, const float* right, int64_t ldb, float* c, int64_t ldc,
                        bool add);

template <int rows, int columns>
void multiply(int64_t k, const LeftOperand& left, const float* right, int64_t ldb, float* c, int64_t ldc, bool add) {
  Lanes sums[rows][columns] = {};
  if (add) {
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < columns; ++v) load_all(sums[i][v], c + i * ldc + v * kLanes);
  }
  const float* column = left.data;
  for (int64_t p = 0; p < k; ++p, column += left.step, right += ldb) {
    Lanes row[columns];
    for (int v = 0; v < columns; ++v) load_all(row[v], right + v * kLanes);
    for (int i = 0; i < rows; ++i) {
      const float number = column[i * left.row];
      for (int v = 0; v < columns; ++v) sums[i][v] += number * row[v];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < columns; ++v) store_all(c + i * ldc + v * kLanes, sums[i][v]);
}

template <int... shapes>
constexpr std::array<Kernel, sizeof...(shapes)> kernels_of(std::integer_sequence<int, shapes...>) {
  return {multiply<shapes / kColumns + 1, shapes % kColumns + 1>...};
}

constexpr auto kKernels = kernels_of(std::make_integer_sequence<int, kRows * kColumns>());

}  // namespace

void tile_product(int64_t m, int64_t n, int64_t k, const LeftOperand& left, const float* right, int64_t ldb, float* c,
                  int64_t ldc, bool add) {
  for (int64_t p = 0; p < k; p += kDepth, add = true) {
    const int64_t depth = std::min(kDepth, k - p);
    for (int64_t j = 0; j < n; j += kColumns * kLanes) {
      const int64_t columns = std::min<int64_t>(kColumns, (n - j) / kLanes);
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, m - i);
        kKernels[static_cast<size_t>((rows - 1) * kColumns + columns - 1)](
            depth, {left.data + i * left.row + p * left.step, left.row, left.step}, right + p * ldb + j, ldb,
            c + i * ldc + j, ldc, add);
      }
    }
  }
}
