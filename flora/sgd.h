// sgd.h: stochastic gradient descent, with the fused sink the LOMO of arXiv 2306.09782. No state without momentum; one
// pass over gradient and weight.
#pragma once

#include <vector>

#include "flora/optimizer.h"

class Sgd final : public Optimizer {
 public:
  Sgd(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend);

  void begin_step(uint32_t, StepScalars&) override {}
  void update(const Parameter& parameter, Tensor weight, Tensor master, const Gradient& gradient,
              StepScalars* scalars) override;

 private:
  std::vector<int> momentum_;  // numbers in states_, by Parameter::index; -1 with beta1 = 0
};
