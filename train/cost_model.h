// cost_model.h: how long a training step of a configuration should take, from the speeds of the device.
#pragma once

#include "train/speeds.h"

// Bytes of one block that move between host and device when it does not stay there.
struct BlockBytes {
  double weights = 0, state = 0;
};
BlockBytes block_bytes(const EngineConfig& config, Backend& backend);

struct StepTime {
  double forward = 0, head = 0, backward = 0, update = 0;  // seconds per step, transfers that are waited for included
  double seconds() const { return forward + head + backward + update; }
};

// With everything else equal, more sequences per micro-batch never take longer per token.
StepTime predict_step(const EngineConfig& config, const Speeds& speeds, const BlockBytes& bytes);

int64_t tokens_per_step(const EngineConfig& config);
