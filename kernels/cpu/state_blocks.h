// state_blocks.h: elementwise work on weights, gradients and optimizer states of any dtype, in blocks of kQuantBlock
// elements. A block is widened to fp32 in the L1 cache (fp32 tensors are read where they are), worked on, and rounded
// back, so an operation is one loop over fp32 numbers and one pass over memory, whatever the dtypes.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/parallel.h"
#include "kernels/dispatch.h"
#include "kernels/philox.h"
#include "kernels/tensor.h"

using Block = float[kQuantBlock];

// Elements [begin, begin + count) of a contiguous tensor as fp32: the tensor's own memory, or `buffer` after conversion
// from bf16, int8 or uint8. begin is a multiple of kQuantBlock, count at most kQuantBlock.
const float* load_block(const Tensor& tensor, int64_t begin, int64_t count, Block& buffer);

// The other way: round to nearest, or quantize with a new scale.
void store_block(const Tensor& tensor, int64_t begin, int64_t count, const float* values);

// bf16 tensors are rounded stochastically with the numbers of (key, step), others as in store_block().
void store_block_stochastic(const Tensor& tensor, int64_t begin, int64_t count, const float* values,
                            const RandomKey& key, uint32_t step);

// out[i] = normal number `first + i` of the stream (key, step).
void fill_normals(float* out, uint64_t first, int64_t count, const RandomKey& key, uint32_t step);

// out[i] = +-magnitude, sign `first + i` of the stream.
void fill_signs(float* out, uint64_t first, int64_t count, float magnitude, const RandomKey& key, uint32_t step);

// f(begin, count) for every block of `elements`. f must not throw.
template <typename F>
void for_each_block(int threads, int64_t elements, F&& f) {
  static_assert(kSpan % kQuantBlock == 0);
  parallel_blocks(threads, elements, kSpan, [&](int64_t span_begin, int64_t span_end) {
    for (int64_t begin = span_begin; begin < span_end; begin += kQuantBlock)
      f(begin, std::min(kQuantBlock, span_end - begin));
  });
}
