// sgd.cpp: stochastic gradient descent; see sgd.h.
#include "flora/sgd.h"

#include "flora/optimizer_state.h"

Sgd::Sgd(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
    : Optimizer(config, parameters, backend) {
  for (const Parameter& p : parameters)
    momentum_.push_back(
        config.beta1 > 0 ? states_.add(p, "momentum", momentum_dtype(config.state_dtype, p), p.matrix, p.rows, p.cols)
                         : -1);
}

void Sgd::update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) {
  update_rows(parameter, weight, master, gradient, {}, scalars);
}

void Sgd::update_in_blocks(const Parameter& parameter, Tensor weight, Tensor master, const BlockedGradient& gradient,
                           StepScalars* scalars) {
  gradient.pass([&](int64_t begin, Tensor rows) {
    update_rows(parameter, weight, master, rows, {begin, rows.rows()}, scalars);
  });
}

// `gradient` holds these rows only, everything else is whole.
void Sgd::update_rows(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, const RowRange& rows,
                      StepScalars* scalars) {
  states_.hold(parameter.layer, Access::kUpdate);
  const Tensor m = rows.of(states_.get(momentum_.at(static_cast<size_t>(parameter.index))));
  pieces_.update(parameter, rows.of(weight), rows.of(master), rounding(parameter, rows.begin), scalars,
                 [&](const Tensor& w, const Tensor& copy, const RowRange& piece, const RandomKey& key) {
                   backend_.sgd_update(w, copy, piece.of(m), piece.of(gradient),
                                       {.beta1 = config_.beta1, .weight_decay = decay_of(parameter)}, key, scalars);
                 });
}
