// planner.h: the fastest setting of a run that fits a memory limit. Only settings that leave the update rule alone are
// searched: micro-batch, recompute level, head chunk, gradient blocks, offload, and with several ranks whether they
// keep the weights together.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "parallel/job.h"
#include "train/cost_model.h"
#include "train/run_setup.h"

// What a run may take. Where host and device memory are the same (a CPU), the plan's parts for both must fit
// `host` together.
struct MemoryLimit {
  size_t device = 0, host = 0;
  bool shared = false;
};

// What the device and the machine have now. Of several ranks the one that has least decides; those on one machine share
// its memory.
MemoryLimit available_memory_limit(const Backend& backend, Job& job);

struct Bytes {
  size_t device = 0, host = 0;
};
bool fits(const Bytes& bytes, const MemoryLimit& limit);

// Bytes that a plan takes at least: for each phase of a step, what is alive in it. No layout needed.
Bytes least_bytes(const MemoryPlan& plan);

// What may be chosen. Micro-batches divide sequences_per_step (of a rank), or, where that is 0 and a step is one
// micro-batch, are powers of two up to largest_micro_batch.
struct SearchSpace {
  bool micro_batch = false, recompute = false, head_chunk = false, gradient_blocks = false, offload = false,
       spread = false;
  int64_t sequences_per_step = 0, largest_micro_batch = 1;
};

// What the request leaves open: flags that were not given, or, with `given_too`, as if none of them had been. A resumed
// run may change only what leaves its numbers alone.
SearchSpace search_space(const RunSetup& setup, bool given_too = false);

// Gradients in blocks need the fused mode, all of the step's tokens in one micro-batch, and of Flora and Adafactor a
// factored second moment.
bool gradient_blocks_possible(const EngineConfig& config);

// How many tokens the head may take at a time: of the micro-batch, its halves, quarters and so on the largest part with
// which the plan leaves a sixteenth of the device's memory, if it is more than the configuration has; else that.
int64_t longest_head_chunk(const EngineConfig& config, const MemoryLimit& limit, Backend& backend);

struct Candidate {
  EngineConfig config;
  size_t device_bytes = 0, host_bytes = 0;  // 0 until it is planned
  double seconds = 0;                       // predicted, per step
  bool updates_in_turn = false;             // for lack of memory to have them beside the backward pass
  double seconds_per_token() const { return seconds / static_cast<double>(tokens_per_step(config)); }
  Bytes bytes() const { return {device_bytes, host_bytes}; }
};

// "--micro-batch 4 --recompute none ...": everything that is searched.
std::string settings_flags(const EngineConfig& config);

// All settings of the space, fastest first; the rest of the configuration is `start`'s. Not yet planned.
std::vector<Candidate> candidates(const EngineConfig& start, const SearchSpace& space, const Rates& rates,
                                  Backend& backend);

// The first `count` of them that fit, in that order.
std::vector<Candidate> fitting(const std::vector<Candidate>& candidates, const MemoryLimit& limit, size_t count,
                               Backend& backend);

// The one that takes the least memory on the device, among those whose host memory fits if there are such; where both
// are the same memory, the least in all. Empty only without candidates.
std::optional<Candidate> smallest(const std::vector<Candidate>& candidates, const MemoryLimit& limit, Backend& backend);
