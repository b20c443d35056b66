// sgd.cpp: stochastic gradient descent; see sgd.h.
#include "flora/sgd.h"

#include "flora/optimizer_state.h"

Sgd::Sgd(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend)
    : ElementwiseOptimizer(config, parameters, backend) {
  for (const Parameter& p : parameters)
    momentum_.push_back(
        config.beta1 > 0 ? states_.add(p, "momentum", momentum_dtype(config.state_dtype, p), p.matrix, p.rows, p.cols)
                         : -1);
}

void Sgd::update_rows(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, const RowRange& rows,
                      StepScalars* scalars) {
  const Tensor m = rows.of(states_.get(momentum_.at(static_cast<size_t>(parameter.index))));
  pieces_.update(parameter, rows.of(weight), rows.of(master), rounding(parameter, rows.begin), scalars,
                 [&](const Tensor& w, const Tensor& copy, const RowRange& piece, const RandomKey& key) {
                   backend_.sgd_update(w, copy, piece.of(m), piece.of(gradient),
                                       {.beta1 = config_.beta1, .weight_decay = decay_of(parameter)}, key, scalars);
                 });
}
