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

void Sgd::update(const Parameter& parameter, Tensor weight, Tensor master, const Gradient& gradient,
                 StepScalars* scalars) {
  states_.hold(parameter.layer, Access::kUpdate);
  const SgdOptions options{.beta1 = config_.beta1, .weight_decay = decay_of(parameter)};
  gradient.pass([&](const RowRange& rows, const Tensor& g) {
    const Tensor m = rows.of(states_.get(momentum_.at(static_cast<size_t>(parameter.index))));
    pieces_.update(parameter, rows.of(weight), rows.of(master), rounding(parameter, rows.begin), scalars,
                   [&](const Tensor& w, const Tensor& copy, const RowRange& piece, const RandomKey& key) {
                     backend_.sgd_update(w, copy, piece.of(m), piece.of(g), options, key, scalars);
                   });
  });
}
