// sgd.h: stochastic gradient descent, with the fused sink the LOMO of arXiv 2306.09782. No state without momentum; one
// pass over gradient and weight.
#pragma once

#include <vector>

#include "flora/elementwise_optimizer.h"

class Sgd final : public ElementwiseOptimizer {
 public:
  Sgd(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend);

  void begin_step(uint32_t, StepScalars&) override {}

 private:
  void update_rows(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, const RowRange& rows,
                   StepScalars* scalars) override;

  std::vector<int> momentum_;  // numbers in states_, by Parameter::index; -1 with beta1 = 0
};
