// speeds.h: how long the parts of a training step take on a device: measured within a few seconds and remembered in a
// file, or, where there is no device, nominal values that only put settings in order.
#pragma once

#include <string>

#include "kernels/backend.h"
#include "train/engine.h"

// Seconds of a call that works on an amount: a part that every call costs, and a part in proportion. Never negative, so
// that a larger amount is never slower per unit.
struct Cost {
  double per_call = 0, per_unit = 0;
  double operator()(double amount) const { return per_call + per_unit * amount; }
};

struct Speeds {
  bool measured = false;
  bool copies_overlap = false;  // transfers run beside the computation
  // One block; the amount is tokens, of attention sequences.
  Cost linear_forward;          // its four products
  Cost linear_input_gradient;   // the same four backward, with GELU's gradient
  Cost linear_weight_gradient;  // and the gradients of the four matrices
  Cost attention_forward, attention_backward;
  Cost norms, gelu;     // two LayerNorms with their residual sums; one GELU
  Cost norms_backward;  // and the gradients of the biases
  // The head, for one row of the vocabulary; the amount is tokens of a chunk.
  Cost logits, classifier, head_input_gradient, head_weight_gradient;
  // Seconds.
  double update_block = 0;  // of the optimizer, for all parameters of a block
  double update_row = 0;    // for one row of an embedding
  double decode_block = 0;  // 8-bit matrices of a block to the activations' dtype
  double encode_block = 0;  // and back after an update
  // Bytes per second.
  double bandwidth = 0;  // read and written by an elementwise operation
  double to_device = 0, to_host = 0;
};

// For order only: what a device of this kind (the backend's name) reaches by its data sheet.
Speeds nominal_speeds(const EngineConfig& config, const std::string& backend);

// Runs the operations of one block, a slice of the head and the optimizer on `backend`; takes the memory of a few
// matrices of the block and gives it back. Its workspace is unset afterwards. Falls back to nominal speeds when the
// memory for it is not there.
Speeds measure_speeds(const EngineConfig& config, Backend& backend);

// What the speeds of a configuration depend on, as one line of text.
std::string speeds_key(const EngineConfig& config, const Backend& backend);
