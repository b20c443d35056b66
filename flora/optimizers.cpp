// optimizers.cpp: what all optimizers share, the two that work element by element, and the factory. Flora and Adafactor
// are in flora.cpp.
#include "flora/optimizers.h"

#include <cmath>
#include <stdexcept>

#include "flora/flora.h"

int64_t gradient_block_rows(const Parameter& p, GradientBlocks blocks) {
  constexpr int64_t kTileRows = 8;  // whole octets where rows become columns of a product
  const bool wanted =
      p.long_lived ? blocks != GradientBlocks::kWhole : blocks == GradientBlocks::kAll && p.matrix && !p.embedding;
  if (!wanted) return 0;
  const int64_t small = std::min(p.rows, p.cols);
  const int64_t step = std::max(kTileRows, quant_rows(p.cols));
  const int64_t rows = std::max(small * small / p.cols / step, int64_t{1}) * step;
  return !p.long_lived && rows >= p.rows ? 0 : std::min(rows, p.rows);
}

float half_life_decay(const OptimizerConfig& config) {
  return static_cast<float>(
      std::exp2(-static_cast<double>(config.tokens_per_step) / static_cast<double>(config.half_life)));
}

Optimizer::Optimizer(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
    : config_(config),
      backend_(backend),
      states_(parameters, config.states, backend),
      pieces_(config.weight_piece, backend) {
  require_indexed(parameters);
  for (const Parameter& parameter : parameters) pieces_.reserve(parameter);
}

void Optimizer::declare(MemoryPlan& plan) {
  states_.declare(plan);
  pieces_.declare(plan);
}

int Optimizer::add_momentum(const Parameter& p) {
  if (config_.beta1 <= 0) return -1;
  const bool plain = config_.state_dtype == DType::kI8 && !p.matrix;
  return states_.add(p, "momentum", p.tensor(nullptr, plain ? DType::kF32 : config_.state_dtype));
}

int Optimizer::add_second_moment(const Parameter& p) {
  const bool codes = config_.state_dtype == DType::kI8 && p.matrix;
  return states_.add(p, "second_moment", p.tensor(nullptr, codes ? DType::kU8 : DType::kF32));
}

RandomKey Optimizer::rounding(const Parameter& parameter, int64_t begin) const {
  return {.seed = config_.seed,
          .purpose = RandomPurpose::kWeightRounding,
          .tensor = parameter.hash(),
          .offset = static_cast<uint64_t>(begin)};
}

ParameterUpdate Optimizer::update_of(const VectorGradient& vector) const {
  const Parameter& p = *vector.parameter;
  return {.weight = vector.weight,
          .master = vector.master,
          .grad = vector.gradient,
          .weight_decay = decay_of(p),
          .lr_scale = lr_scale_of(p),
          .key = rounding(p)};
}

void Optimizer::update_part(const Parameter& parameter, const ParameterStore::Kept&, const Gradient&, StepScalars*) {
  throw std::logic_error(parameter.name + ": this optimizer needs whole matrices");
}

namespace {

// What AdamW and SGD share: an update of any elements of a parameter needs these elements only, of everything.
class Elementwise : public Optimizer {
 public:
  using Optimizer::Optimizer;

  void update(const Parameter& p, Tensor weight, Tensor master, const Gradient& gradient,
              StepScalars* scalars) override {
    if (!updates_parts()) states_.hold(p.layer, Access::kUpdate);  // else what comes here is on the device
    const Tensor momentum = states_.get(momentum_of(p)), second_moment = states_.get(second_moment_of(p));
    SquaresTarget squares = gradient.squares();
    if (p.quantized && squares.out) {  // how a sum is made does not depend on the pieces of a weight
      backend_.sum_squares(Tensor::of(squares.out, DType::kF32, {1}), gradient.whole(), squares.accumulate);
      squares = {};
    }
    gradient.pass([&](const RowRange& rows, const Tensor& g) {
      const Tensor m = rows.of(momentum), v = rows.of(second_moment);
      pieces_.update(p, rows.of(weight), rows.of(master), rounding(p, rows.begin * p.cols), scalars,
                     [&](const Tensor& w, const Tensor& copy, const RowRange& piece, const RandomKey& key) {
                       update_elements(p, w, copy, piece.of(m), piece.of(v), piece.of(g), key, scalars, squares);
                     });
    });
  }

  void update_vectors(std::span<const VectorGradient> vectors, SquaresTarget squares, StepScalars* scalars) override {
    if (vectors.empty()) return;
    if (!updates_parts()) states_.hold(vectors.front().parameter->layer, Access::kUpdate);
    std::vector<ParameterUpdate> updates;
    for (const VectorGradient& vector : vectors) {
      updates.push_back(update_of(vector));
      updates.back().momentum = states_.get(momentum_of(*vector.parameter));
      updates.back().second_moment = states_.get(second_moment_of(*vector.parameter));
    }
    step(updates, scalars, squares);
  }

  void update_part(const Parameter& p, const ParameterStore::Kept& kept, const Gradient& gradient,
                   StepScalars* scalars) override {
    const Tensor momentum = states_.part(momentum_of(p)), second_moment = states_.part(second_moment_of(p));
    gradient.pass([&](const RowRange& rows, const Tensor& g) {
      // Of these rows' elements the ones that are kept.
      const int64_t first = rows.begin * p.cols, begin = std::max(first, kept.begin);
      const int64_t count = std::min(first + g.elements(), kept.begin + kept.weight.elements()) - begin;
      if (count <= 0) return;
      const RowRange mine{begin - kept.begin, count};
      update_elements(p, mine.of(kept.weight), mine.of(kept.master), mine.of(momentum), mine.of(second_moment),
                      g.view({g.elements()}).slice(begin - first, count), rounding(p, begin), scalars, {});
    });
    states_.part_changed(momentum_of(p));
    states_.part_changed(second_moment_of(p));
  }

 protected:
  virtual void step(std::span<const ParameterUpdate> updates, const StepScalars* scalars, SquaresTarget squares) = 0;

  std::vector<int> momentum_, second_moment_;  // numbers in states_, by Parameter::index; empty: none

 private:
  void update_elements(const Parameter& p, Tensor weight, Tensor master, Tensor momentum, Tensor second_moment,
                       Tensor gradient, const RandomKey& key, const StepScalars* scalars, SquaresTarget squares) {
    const ParameterUpdate update = {weight,   master,      momentum,       second_moment,
                                    gradient, decay_of(p), lr_scale_of(p), key};
    step({&update, 1}, scalars, squares);
  }

  static int number(const std::vector<int>& numbers, const Parameter& p) {
    return numbers.empty() ? -1 : numbers.at(static_cast<size_t>(p.index));
  }
  int momentum_of(const Parameter& p) const { return number(momentum_, p); }
  int second_moment_of(const Parameter& p) const { return number(second_moment_, p); }
};

// Stochastic gradient descent, with fused updates the LOMO of arXiv 2306.09782. No state without momentum; one pass
// over gradient and weight.
class Sgd final : public Elementwise {
 public:
  Sgd(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
      : Elementwise(config, parameters, backend) {
    for (const Parameter& p : parameters) momentum_.push_back(add_momentum(p));
  }

  void begin_step(uint32_t, StepScalars&) override {}

 private:
  void step(std::span<const ParameterUpdate> updates, const StepScalars* scalars, SquaresTarget squares) override {
    backend_.sgd_update(updates, config_.beta1, scalars, squares);
  }
};

// AdamW (Loshchilov and Hutter, arXiv 1711.05101), the baseline. Two full-size states; one pass over gradient, states
// and weight, 28 bytes a parameter in fp32.
class AdamW final : public Elementwise {
 public:
  AdamW(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
      : Elementwise(config, parameters, backend),
        beta2_(config.half_life > 0 ? half_life_decay(config) : config.beta2) {
    for (const Parameter& p : parameters) {
      momentum_.push_back(add_momentum(p));
      second_moment_.push_back(add_second_moment(p));
    }
  }

  void begin_step(uint32_t step, StepScalars& scalars) override {
    const double t = step;
    scalars.beta2 = beta2_;
    scalars.bias_correction1 = static_cast<float>(1.0 - std::pow(static_cast<double>(config_.beta1), t));
    scalars.bias_correction2 = static_cast<float>(1.0 - std::pow(static_cast<double>(beta2_), t));
  }

 private:
  void step(std::span<const ParameterUpdate> updates, const StepScalars* scalars, SquaresTarget squares) override {
    backend_.adamw_update(updates, {.beta1 = config_.beta1, .beta2 = beta2_, .eps = config_.eps}, scalars, squares);
  }

  float beta2_;
};

}  // namespace

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
