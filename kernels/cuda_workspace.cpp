// cuda_workspace.cpp: see cuda_workspace.h.
#include "kernels/cuda_workspace.h"

#include <algorithm>
#include <string>
#include <utility>

namespace {

// Sums of elements, bias and LayerNorm gradients.
size_t reduction_scratch_bytes(const KernelShapes& shapes) {
  const size_t channels = static_cast<size_t>(std::max<int64_t>(shapes.channels, 1));
  const size_t layernorm = kMaxLayerNormChunks * 2 * channels * sizeof(float);
  const size_t bias = kMaxBiasChunks * 4 * channels * sizeof(float);
  return std::max({layernorm, bias, kMostTogether * static_cast<size_t>(kMaxSumBlocks) * sizeof(double)});
}

// Of the backward pass: the sums of each tile's columns, and dout . out of each row of each head.
size_t attention_scratch_bytes(const KernelShapes& shapes) {
  const int64_t sums = tile_sum_floats(shapes.batch, shapes.sequence, shapes.channels);
  return static_cast<size_t>(sums + shapes.batch * shapes.heads * shapes.sequence) * sizeof(float);
}

// Factored statistics of every matrix of a GPT-2 at once; a wider one goes through the same scratch range by range.
size_t optimizer_scratch_bytes(const KernelShapes& shapes) {
  const int64_t c = std::max<int64_t>(shapes.channels, 1), v = std::max<int64_t>(shapes.vocabulary, 1),
                t = std::max<int64_t>(shapes.sequence, 1);
  int64_t bytes = 0;
  for (auto [rows, cols] : {std::pair{v, c}, {t, c}, {c, 3 * c}, {c, c}, {c, 4 * c}, {4 * c, c}}) {
    const SquaresTiling tiling(rows, cols);
    bytes = std::max({bytes, tiling.range_bytes(tiling.tiles), square_sum_bytes(rows * cols)});
  }
  return static_cast<size_t>(bytes);
}

}  // namespace

std::string cuda_refuses(int64_t channels, int64_t heads) {
  const auto refusal = [](int64_t number, const char* what, const std::string& demand) {
    return std::to_string(number) + " " + what + ": on a GPU they must be " + demand;
  };
  if (channels % kChannelMultiple != 0)
    return refusal(channels, "channels", "a multiple of " + std::to_string(kChannelMultiple));
  if (channels > kMostNormChannels)
    return refusal(channels, "channels", "at most " + std::to_string(kMostNormChannels));
  if (channels / heads > kMostHeadChannels)
    return refusal(channels / heads, "channels in a head", "at most " + std::to_string(kMostHeadChannels));
  return "";
}

SquaresTiling::SquaresTiling(int64_t rows, int64_t cols) : rows(rows), cols(cols), tiles(divide_up(cols, kCols)) {
  static_assert(kMostChunks < kArrivalCounters);
  chunk = std::max<int64_t>(1, divide_up(rows * tiles, kMostChunks * kRowsUnderWay)) * kRowsUnderWay;
  chunks = divide_up(rows, chunk);
}

int64_t SquaresTiling::range_bytes(int64_t range) const {
  return static_cast<int64_t>(sizeof(float)) * range * (chunks * kCols + rows) + finish_bytes();
}

int64_t SquaresTiling::finish_bytes() const {
  return 2 * static_cast<int64_t>(sizeof(double)) * divide_up(rows, kSumRows);
}

size_t cuda_workspace_bytes(const KernelShapes& shapes) {
  const size_t scratch = std::max({kCublasWorkspaceBytes, reduction_scratch_bytes(shapes),
                                   attention_scratch_bytes(shapes), optimizer_scratch_bytes(shapes)});
  return (scratch + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment + kArrivalBytes;
}
