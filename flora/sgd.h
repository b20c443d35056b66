// sgd.h: stochastic gradient descent, with the fused sink the LOMO of arXiv 2306.09782. No state without momentum; one
// pass over gradient and weight.
#pragma once

#include <string>
#include <vector>

#include "flora/optimizer.h"

class Sgd final : public Optimizer {
 public:
  Sgd(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend);

  void declare(MemoryPlan& plan) const override;
  void bind(Arena& arena) override;
  void begin_step(uint32_t, StepScalars&) override {}
  void update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) override;
  std::vector<StateTensor> state() const override;
  std::vector<std::string> compressed_parameters() const override { return {}; }

 private:
  struct Slot {
    Parameter parameter;
    Tensor momentum = {};  // empty with beta1 = 0
  };

  OptimizerConfig config_;
  Backend& backend_;
  std::vector<Slot> slots_;  // by Parameter::index
};
