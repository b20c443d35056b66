// memory_advice.h: what to say when a run needs more memory than there is: flags with which it would fit. First the
// settings that a planner may choose, then changes of the update rule, from cheap to drastic. Plans many engines;
// allocates nothing.
#pragma once

#include <string>

#include "train/planner.h"

// "with --recompute block it needs 1.00 GiB", or that nothing helps.
std::string advice_that_fits(const RunSetup& setup, const MemoryLimit& limit, Backend& backend);

// One line for a run as it was asked for, whose plan is over the limit, on the device or in host memory.
std::string memory_advice(const RunSetup& setup, const MemoryLimit& limit, Backend& backend);
