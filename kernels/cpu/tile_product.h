// tile_product.h: products of matrices that are in the cache already, as they lie: nothing is packed, and the caller
// leaves out the parts that it does not need.
#pragma once

#include <cstdint>

// Number (i, p) of the left operand is data[i * row + p * step].
struct LeftOperand {
  const float* data;
  int64_t row, step;
};

// c[m, n] = left[m, k] right[k, n], or c plus that with `add`; right and c row-major with strides ldb and ldc. n is a
// multiple of 16, k at least 1. Each number is summed in the order of k, whatever m and n are.
void tile_product(int64_t m, int64_t n, int64_t k, const LeftOperand& left, const float* right, int64_t ldb, float* c,
                  int64_t ldc, bool add);
