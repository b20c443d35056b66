// blocked_gradient.cpp: see blocked_gradient.h.
#include "flora/blocked_gradient.h"

#include <algorithm>

int64_t gradient_block_rows(const Parameter& p, GradientBlocks blocks) {
  constexpr int64_t kTileRows = 8;  // of the tensor cores
  const bool wanted =
      p.long_lived ? blocks != GradientBlocks::kWhole : blocks == GradientBlocks::kAll && p.matrix && !p.embedding;
  if (!wanted) return 0;
  const int64_t small = std::min(p.rows, p.cols);
  const int64_t step = std::max(kTileRows, quant_rows(p.cols));
  const int64_t rows = std::max(small * small / p.cols / step, int64_t{1}) * step;
  return !p.long_lived && rows >= p.rows ? 0 : std::min(rows, p.rows);
}
