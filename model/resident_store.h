// resident_store.h: all weights (and master copies, where asked for) stay on the device.
#pragma once

#include <cstdint>
#include <vector>

#include "flora/parameter_store.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"

class ResidentStore final : public ParameterStore {
 public:
  ResidentStore(std::vector<Parameter> parameters, DType weight_dtype, bool master_weights);

  void declare(MemoryPlan& plan) const;
  void bind(Arena& arena, Backend& backend);  // padding rows become zeros, the rest is undefined

  const std::vector<Parameter>& parameters() const override { return parameters_; }
  void acquire(int) override {}
  void release(int, bool) override {}
  Tensor weight(const Parameter& parameter) override;
  Tensor padded_weight(const Parameter& parameter) override;
  Tensor master(const Parameter& parameter) override;

 private:
  std::vector<Parameter> parameters_;
  DType weight_dtype_;
  bool master_weights_;
  std::vector<void*> weights_, masters_;
};
