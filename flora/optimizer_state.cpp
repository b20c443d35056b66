// optimizer_state.cpp: states and scratch of optimizers; see optimizer_state.h. Once per run, not per step.
#include "flora/optimizer_state.h"

#include <stdexcept>

DType momentum_dtype(DType state_dtype, const Parameter& parameter) {
  return state_dtype == DType::kI8 && !parameter.matrix ? DType::kF32 : state_dtype;
}

DType second_moment_dtype(DType state_dtype, const Parameter& parameter) {
  return state_dtype == DType::kI8 && parameter.matrix ? DType::kU8 : DType::kF32;
}

void zero_state(Backend& backend, const Tensor& state) {
  backend.fill(state.data, 0, state.bytes());
  if (state.scales) backend.fill(state.scales, 0, static_cast<size_t>(quant_blocks(state.elements())) * sizeof(float));
}

uint32_t gradient_phases(const Parameter& parameter) {
  if (parameter.layer >= 0 || (parameter.embedding && !parameter.long_lived)) return kPhaseBackward;
  return kPhaseHead | kPhaseBackward;
}

void require_indexed(const std::vector<Parameter>& parameters) {
  for (size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].index != static_cast<int>(i))
      throw std::logic_error("parameter " + parameters[i].name + " does not stand at its index");
}
