// memory_advice.h: what to say when a run needs more memory than the device has.
#pragma once

#include <string>

#include "kernels/backend.h"
#include "train/engine.h"

// What is planned by category, how much is missing, and the first settings, from cheap to drastic, with which it would
// fit `available` bytes. Plans a few engines; allocates nothing.
std::string memory_advice(const EngineConfig& config, Backend& backend, size_t available);
