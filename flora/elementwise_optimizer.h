// elementwise_optimizer.h: optimizers whose update of an element needs nothing of the others (AdamW, SGD): a gradient
// in blocks of rows is one pass, and gives the same bits as a whole one.
#pragma once

#include "flora/optimizer.h"

class ElementwiseOptimizer : public Optimizer {
 public:
  using Optimizer::Optimizer;

  void update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) final {
    states_.hold(parameter.layer, Access::kUpdate);
    update_rows(parameter, weight, master, gradient, {}, scalars);
  }

  void update_in_blocks(const Parameter& parameter, Tensor weight, Tensor master, const BlockedGradient& gradient,
                        StepScalars* scalars) final {
    states_.hold(parameter.layer, Access::kUpdate);
    gradient.pass([&](int64_t begin, Tensor rows) {
      update_rows(parameter, weight, master, rows, {begin, rows.rows()}, scalars);
    });
  }

 private:
  // `gradient` holds these rows only, weight and master are whole; the parameter's states are held.
  virtual void update_rows(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient,
                           const RowRange& rows, StepScalars* scalars) = 0;
};
