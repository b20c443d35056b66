// adamw.h: AdamW (Loshchilov and Hutter, arXiv 1711.05101), the baseline. Two full-size states; one pass over gradient,
// states and weight, 28 bytes a parameter in fp32.
#pragma once

#include <string>
#include <vector>

#include "flora/optimizer.h"

class AdamW final : public Optimizer {
 public:
  AdamW(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend);

  void declare(MemoryPlan& plan) const override;
  void bind(Arena& arena) override;
  void begin_step(uint32_t step, StepScalars& scalars) override;
  void update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) override;
  std::vector<StateTensor> state() const override;
  std::vector<std::string> compressed_parameters() const override { return {}; }

 private:
  struct Slot {
    Parameter parameter;
    Tensor momentum = {}, second_moment = {};  // momentum stays empty with beta1 = 0
  };

  OptimizerConfig config_;
  Backend& backend_;
  std::vector<Slot> slots_;  // by Parameter::index
};
