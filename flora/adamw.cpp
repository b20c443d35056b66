// adamw.cpp: AdamW; see adamw.h.
#include "flora/adamw.h"

#include <cmath>

#include "flora/optimizer_state.h"

AdamW::AdamW(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
    : config_(config), backend_(backend) {
  require_indexed(parameters);
  for (const Parameter& parameter : parameters) slots_.push_back({.parameter = parameter});
}

void AdamW::declare(MemoryPlan& plan) const {
  for (const Slot& slot : slots_) {
    const Parameter& p = slot.parameter;
    if (config_.beta1 > 0)
      plan.add_tensor(p.name + ".momentum", Category::kOptimizerState, momentum_dtype(config_.state_dtype, p),
                      p.elements());
    plan.add_tensor(p.name + ".second_moment", Category::kOptimizerState, second_moment_dtype(config_.state_dtype, p),
                    p.elements());
  }
}

void AdamW::bind(Arena& arena) {
  for (Slot& slot : slots_) {
    const Parameter& p = slot.parameter;
    if (config_.beta1 > 0)
      slot.momentum = bind_state(arena, backend_, p.name + ".momentum", momentum_dtype(config_.state_dtype, p),
                                 p.matrix, p.rows, p.cols);
    slot.second_moment = bind_state(arena, backend_, p.name + ".second_moment",
                                    second_moment_dtype(config_.state_dtype, p), p.matrix, p.rows, p.cols);
  }
}

void AdamW::begin_step(uint32_t step, StepScalars& scalars) {
  const double t = step;
  scalars.beta2 = config_.beta2;
  scalars.bias_correction1 = static_cast<float>(1.0 - std::pow(static_cast<double>(config_.beta1), t));
  scalars.bias_correction2 = static_cast<float>(1.0 - std::pow(static_cast<double>(config_.beta2), t));
}

void AdamW::update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) {
  const Slot& slot = slots_.at(static_cast<size_t>(parameter.index));
  backend_.adamw_update(weight, master, slot.momentum, slot.second_moment, gradient,
                        {.beta1 = config_.beta1,
                         .beta2 = config_.beta2,
                         .eps = config_.eps,
                         .weight_decay = parameter.decay ? config_.weight_decay : 0.0f},
                        rounding_key(config_.seed, parameter), scalars);
}

std::vector<StateTensor> AdamW::state() const {
  std::vector<StateTensor> tensors;
  for (const Slot& slot : slots_) {
    if (slot.momentum) tensors.push_back({slot.parameter.name + ".momentum", slot.momentum});
    tensors.push_back({slot.parameter.name + ".second_moment", slot.second_moment});
  }
  return tensors;
}
