// adamw.cpp: AdamW; see adamw.h.
#include "flora/adamw.h"

#include <cmath>

#include "flora/optimizer_state.h"

AdamW::AdamW(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
    : Optimizer(config, parameters, backend) {
  for (const Parameter& p : parameters) {
    Slot slot;
    if (config.beta1 > 0)
      slot.momentum = states_.add(p, "momentum", momentum_dtype(config.state_dtype, p), p.matrix, p.rows, p.cols);
    slot.second_moment =
        states_.add(p, "second_moment", second_moment_dtype(config.state_dtype, p), p.matrix, p.rows, p.cols);
    slots_.push_back(slot);
  }
}

void AdamW::begin_step(uint32_t step, StepScalars& scalars) {
  const double t = step;
  scalars.beta2 = config_.beta2;
  scalars.bias_correction1 = static_cast<float>(1.0 - std::pow(static_cast<double>(config_.beta1), t));
  scalars.bias_correction2 = static_cast<float>(1.0 - std::pow(static_cast<double>(config_.beta2), t));
}

void AdamW::update(const Parameter& parameter, Tensor weight, Tensor master, const Gradient& gradient,
                   StepScalars* scalars) {
  states_.hold(parameter.layer, Access::kUpdate);
  const Slot& slot = slots_.at(static_cast<size_t>(parameter.index));
  const AdamWOptions options{
      .beta1 = config_.beta1, .beta2 = config_.beta2, .eps = config_.eps, .weight_decay = decay_of(parameter)};
  gradient.pass([&](const RowRange& rows, const Tensor& g) {
    const Tensor m = rows.of(states_.get(slot.momentum)), v = rows.of(states_.get(slot.second_moment));
    pieces_.update(parameter, rows.of(weight), rows.of(master), rounding(parameter, rows.begin), scalars,
                   [&](const Tensor& w, const Tensor& copy, const RowRange& piece, const RandomKey& key) {
                     backend_.adamw_update(w, copy, piece.of(m), piece.of(v), piece.of(g), options, key, scalars);
                   });
  });
}
