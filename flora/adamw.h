// adamw.h: AdamW (Loshchilov and Hutter, arXiv 1711.05101), the baseline. Two full-size states; one pass over gradient,
// states and weight, 28 bytes a parameter in fp32.
#pragma once

#include <vector>

#include "flora/optimizer.h"

class AdamW final : public Optimizer {
 public:
  AdamW(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend);

  void begin_step(uint32_t step, StepScalars& scalars) override;
  void update(const Parameter& parameter, Tensor weight, Tensor master, const Gradient& gradient,
              StepScalars* scalars) override;

 private:
  struct Slot {
    int momentum = -1, second_moment = -1;  // numbers in states_; no momentum with beta1 = 0
  };
  std::vector<Slot> slots_;  // by Parameter::index
};
