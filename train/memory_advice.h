// memory_advice.h: what to say when a run needs more memory than there is: how much is missing, and flags with which it
// would fit. First the settings that a planner may choose, then changes of the update rule: one micro-batch per step,
// Flora with the fused backward pass, 8-bit states, 8-bit weights. Plans many engines; allocates nothing.
#pragma once

#include <string>

#include "train/budget.h"

// For a run as it was asked for, whose plan is over the limit, on the device or in host memory.
std::string memory_advice(const RunSetup& setup, const MemoryLimit& limit, Backend& backend);

// For a budget within which nothing fits that the request leaves open.
std::string budget_advice(const RunSetup& undecided, const Budget& budget, Backend& backend);
