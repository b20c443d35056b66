// cost_model.h: how long a training step of a configuration should take: the FLOPs, the bytes and the calls of its
// operations, by what the device does of each in a second.
#pragma once

#include <string>

#include "kernels/backend.h"
#include "train/engine.h"

struct Rates {
  bool measured = false;
  bool copies_overlap = false;  // transfers run beside the computation
  double flops = 0;             // of a block's matrix product, per second
  double bytes = 0;             // read and written by a copy on the device, per second
  double transfer = 0;          // bytes per second from host to device, and back
  double call = 0;              // seconds that every operation costs
  double wire = 0;              // bytes per second that a rank sends to another; never measured
  double tiles = 0;  // of 128 x 256 numbers of a product, which the device computes at a time; never measured
};

// For order only: what a device of this kind (the backend's name) reaches by its data sheet.
Rates nominal_rates(const EngineConfig& config, const std::string& backend);

// What `backend` reaches, measured in a fraction of a second on one product of the model's width and one copy. Takes
// memory for them and gives it back; the workspace is unset afterwards. Nominal rates where that memory is not there.
Rates measure_rates(const EngineConfig& config, Backend& backend);

// Bytes of one block that move when it does not stay on the device: to and from host memory, or between ranks.
struct BlockBytes {
  double weights = 0, state = 0;
};
BlockBytes block_bytes(const EngineConfig& config, Backend& backend);

// Seconds of a step, transfers that are waited for included. With everything else equal, more sequences per micro-batch
// never take longer per token.
double predict_step(const EngineConfig& config, const Rates& rates, const BlockBytes& bytes);

// Of all ranks.
int64_t tokens_per_step(const EngineConfig& config);
