// planner.h: the fastest setting of a run that fits a memory budget. Only settings that leave the update rule alone are
// tried: micro-batch, recompute level, head chunk, gradient blocks and offload, each only where the user left it open.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "train/cost_model.h"

// What a run may take. Where host and device memory are the same (a CPU), the plan's parts for both must fit
// `host` together.
struct MemoryLimit {
  size_t device = 0, host = 0;
  bool shared = false;
};

// What the planner may choose. Micro-batches divide sequences_per_step, or, where that is 0 and a step is one
// micro-batch, are powers of two up to largest_micro_batch.
struct Freedom {
  bool micro_batch = false, recompute = false, head_chunk = false, gradient_blocks = false, offload = false;
  int64_t sequences_per_step = 0, largest_micro_batch = 1;
};

struct Choice {
  EngineConfig config;
  size_t device_bytes = 0, host_bytes = 0;
  double seconds = 0;  // predicted, per step
  double seconds_per_token() const { return seconds / static_cast<double>(tokens_per_step(config)); }
};

// Bytes that a plan takes at least: for each phase of a step, what is alive in it. No layout needed.
struct Bytes {
  size_t device = 0, host = 0;
};
Bytes least_bytes(const MemoryPlan& plan);

// Gradients in blocks need fused updates, all of the step's tokens in one micro-batch, and of Flora and Adafactor a
// factored second moment.
bool gradient_blocks_possible(const EngineConfig& config);

class Planner {
 public:
  Planner(Backend& backend, const Speeds& speeds) : backend_(backend), speeds_(speeds) {}

  // All settings that the freedom allows, fastest first; the rest of the configuration is `start`'s. Not yet planned.
  std::vector<Choice> candidates(const EngineConfig& start, const Freedom& freedom) const;

  // The first `count` of them that fit, in that order.
  std::vector<Choice> fitting(const std::vector<Choice>& candidates, const MemoryLimit& limit, size_t count) const;

  // The one that takes the least memory on the device, among those whose host memory fits if there are such; where both
  // are the same memory, the least in all. Empty only without candidates.
  std::optional<Choice> smallest(const std::vector<Choice>& candidates, const MemoryLimit& limit) const;

 private:
  Backend& backend_;
  Speeds speeds_;
};

bool fits(const Bytes& bytes, const MemoryLimit& limit);
