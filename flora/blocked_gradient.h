// blocked_gradient.h: gradients of which only a block of rows exists at a time. Whoever needs several passes over one
// computes it several times.
#pragma once

#include <cstdint>
#include <functional>

#include "flora/parameter.h"
#include "kernels/tensor.h"

// Which gradients are computed and used in blocks of rows instead of as a whole. Only under a fused sink with one
// micro-batch.
enum class GradientBlocks : uint8_t {
  kWhole,      // none
  kEmbedding,  // long-lived ones: the token embedding's and the head's
  kAll,        // those of the blocks' matrices, too
};

// Rows in a block of this parameter's gradient, 0 where it is not in blocks. A block has about as many elements as the
// square of the parameter's smaller dimension, and begins where a block of 8-bit codes does.
int64_t gradient_block_rows(const Parameter& parameter, GradientBlocks blocks);

class BlockedGradient {
 public:
  // load(begin, count): rows [begin, begin + count) of the gradient, valid until the next call; may be changed.
  using Load = std::function<Tensor(int64_t begin, int64_t count)>;

  BlockedGradient(int64_t rows, int64_t block_rows, Load load)
      : rows_(rows), block_rows_(block_rows), load_(std::move(load)) {}

  // One pass: f(begin, rows of the gradient) for every block, in order.
  template <typename F>
  void pass(F&& f) const {
    for (int64_t begin = 0; begin < rows_; begin += block_rows_)
      f(begin, load_(begin, begin + block_rows_ < rows_ ? block_rows_ : rows_ - begin));
  }

 private:
  int64_t rows_, block_rows_;
  Load load_;
};
