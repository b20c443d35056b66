// optimizer_state.h: what all optimizers do alike with their states and scratch: dtypes, memory, phases, random keys.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flora/parameter.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"

// Momentum has the state dtype, but 1-D parameters keep fp32 beside int8 states. Second moments are fp32, those of
// matrices uint8 beside int8.
DType momentum_dtype(DType state_dtype, const Parameter& parameter);
DType second_moment_dtype(DType state_dtype, const Parameter& parameter);

// Elements and, of an 8-bit state, scales become 0.
void zero_state(Backend& backend, const Tensor& state);

// Where a parameter's gradient is alive within a micro-batch: a block's in the backward pass, those outside the blocks
// from the head on, but for an embedding that has no part in the head.
uint32_t gradient_phases(const Parameter& parameter);

// Phases in which parameters are updated, so in which scratch of an update is alive. Never while the head runs: the
// gate has to see the loss first.
inline constexpr uint32_t kUpdatePhases = kPhaseBackward | kPhaseUpdate;

// Throws std::logic_error unless every parameter stands at its own index.
void require_indexed(const std::vector<Parameter>& parameters);
