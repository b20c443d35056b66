// sgd.cpp: stochastic gradient descent; see sgd.h.
#include "flora/sgd.h"

#include "flora/optimizer_state.h"

Sgd::Sgd(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
    : config_(config), backend_(backend) {
  require_indexed(parameters);
  for (const Parameter& parameter : parameters) slots_.push_back({.parameter = parameter});
}

void Sgd::declare(MemoryPlan& plan) const {
  if (config_.beta1 == 0) return;
  for (const Slot& slot : slots_)
    plan.add_tensor(slot.parameter.name + ".momentum", Category::kOptimizerState,
                    momentum_dtype(config_.state_dtype, slot.parameter), slot.parameter.elements());
}

void Sgd::bind(Arena& arena) {
  if (config_.beta1 == 0) return;
  for (Slot& slot : slots_) {
    const Parameter& p = slot.parameter;
    slot.momentum = bind_state(arena, backend_, p.name + ".momentum", momentum_dtype(config_.state_dtype, p), p.matrix,
                               p.rows, p.cols);
  }
}

void Sgd::update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) {
  const Slot& slot = slots_.at(static_cast<size_t>(parameter.index));
  backend_.sgd_update(weight, master, slot.momentum, gradient,
                      {.beta1 = config_.beta1, .weight_decay = parameter.decay ? config_.weight_decay : 0.0f},
                      rounding_key(config_.seed, parameter), scalars);
}

std::vector<StateTensor> Sgd::state() const {
  std::vector<StateTensor> tensors;
  for (const Slot& slot : slots_)
    if (slot.momentum) tensors.push_back({slot.parameter.name + ".momentum", slot.momentum});
  return tensors;
}
