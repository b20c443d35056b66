// add_rows.h: the sum of two tensors, row by row: what add() does, shared with the LayerNorm that adds its residual
// first, so that both round the same way.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

// out = a + b for `count` elements from (row, column) on, on the calling thread. fp32 or bf16, mixed; out may be a or
// b.
void add_row(const Tensor& out, const Tensor& a, const Tensor& b, int64_t row, int64_t column, int64_t count);
