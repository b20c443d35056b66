// optimizer.cpp: which parameters are compressed, and the factory of optimizers. Once per run.
#include "flora/optimizer.h"

#include <algorithm>
#include <stdexcept>

#include "flora/adamw.h"
#include "flora/flora.h"
#include "flora/optimizer_state.h"
#include "flora/sgd.h"

Optimizer::Optimizer(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
    : config_(config),
      backend_(backend),
      states_(parameters, config.streamed_layers, backend),
      pieces_(config.weight_piece, backend) {
  require_indexed(parameters);
  for (const Parameter& parameter : parameters) pieces_.reserve(parameter);
}

void Optimizer::declare(MemoryPlan& plan) {
  states_.declare(plan);
  pieces_.declare(plan);
}

RandomKey Optimizer::rounding(const Parameter& parameter, int64_t begin) const {
  return {.seed = config_.seed,
          .purpose = RandomPurpose::kWeightRounding,
          .tensor = parameter.hash(),
          .offset = static_cast<uint64_t>(begin * parameter.cols)};
}

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

bool is_compressed(const Parameter& parameter, int64_t rank, bool compress_embeddings, ProjectionKind projection) {
  constexpr int64_t kLargestRatio = 4;
  if (!parameter.matrix || rank <= 0) return false;
  const int64_t small = std::min(parameter.rows, parameter.cols), large = std::max(parameter.rows, parameter.cols);
  // r orthonormal rows of length r span everything: their Gram matrix is close to singular and nothing is saved.
  if (projection == ProjectionKind::kOrthonormal ? small <= rank : small < rank) return false;
  return compress_embeddings || large <= kLargestRatio * small;
}

std::unique_ptr<Optimizer> make_optimizer(const OptimizerConfig& config, const std::vector<Parameter>& parameters,
                                          DType gradient_dtype, Backend& backend) {
  if (config.state_dtype != DType::kF32 && config.state_dtype != DType::kBF16 && config.state_dtype != DType::kI8)
    throw std::logic_error(std::string("no optimizer state in ") + dtype_name(config.state_dtype));
  switch (config.kind) {
    case OptimizerKind::kFlora:
    case OptimizerKind::kAdafactor: return std::make_unique<Flora>(config, parameters, gradient_dtype, backend);
    case OptimizerKind::kAdamW: return std::make_unique<AdamW>(config, parameters, backend);
    case OptimizerKind::kSgd: return std::make_unique<Sgd>(config, parameters, backend);
  }
  throw std::logic_error("unknown optimizer");
}
