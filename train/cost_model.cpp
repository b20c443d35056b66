// cost_model.cpp: see cost_model.h. Sums over the operations of a block, times the blocks; lookups, the final LayerNorm
// and the loss are left out, being far below the error of the rest.
#include "train/cost_model.h"

#include <algorithm>

#include "flora/optimizer.h"

namespace {

// Batch, launches and the scalars of a step: the part that a larger micro-batch always saves.
constexpr double kPerMicroBatch = 2e-5;

// Passes over a gradient that is computed block by block: statistics, size of the update, update.
double gradient_passes(const OptimizerConfig& optimizer) {
  const bool factored = optimizer.kind == OptimizerKind::kFlora || optimizer.kind == OptimizerKind::kAdafactor;
  return !factored ? 1 : optimizer.clip > 0 ? 3 : 2;
}

// Computing and transfers of one pass over the blocks.
double together(double compute, double transfer, const Speeds& speeds) {
  return speeds.copies_overlap ? std::max(compute, transfer) : compute + transfer;
}

struct Amounts {
  double sequences, tokens, layers, micro_batches, chunk;

  explicit Amounts(const EngineConfig& config)
      : sequences(static_cast<double>(config.shapes.batch)),
        tokens(sequences * static_cast<double>(config.shapes.sequence)),
        layers(static_cast<double>(config.model.layers)),
        micro_batches(config.gradients.micro_batches),
        chunk(static_cast<double>(config.shapes.head_chunk)) {}
};

double block_forward(const Speeds& s, const Amounts& a) {
  return s.linear_forward(a.tokens) + s.attention_forward(a.sequences) + s.norms(a.tokens) + s.gelu(a.tokens);
}

double block_recompute(Recompute level, const Speeds& s, const Amounts& a) {
  switch (level) {
    case Recompute::kNone: return 0;
    case Recompute::kGelu: return s.gelu(a.tokens);
    case Recompute::kNormsGelu: return s.gelu(a.tokens) + s.norms(a.tokens);
    case Recompute::kAttention: return s.gelu(a.tokens) + s.norms(a.tokens) + s.attention_forward(a.sequences);
    case Recompute::kBlock: break;
  }
  // All but the last product, a third of the four.
  return block_forward(s, a) - s.linear_forward(a.tokens) / 3;
}

double block_backward(const EngineConfig& config, const Speeds& s, const Amounts& a) {
  const double products = config.gradients.blocks == GradientBlocks::kAll ? gradient_passes(config.optimizer) : 1;
  return block_recompute(config.shapes.recompute, s, a) + s.linear_input_gradient(a.tokens) +
         products * s.linear_weight_gradient(a.tokens) + s.attention_backward(a.sequences) + s.norms_backward(a.tokens);
}

// A pass over the head, chunk by chunk. The number of chunks is not rounded up, so that it never grows faster than the
// tokens.
double head_pass(const EngineConfig& config, const Speeds& s, const Amounts& a) {
  const double chunks = std::max(1.0, a.tokens / a.chunk);
  const double rows = static_cast<double>(config.model.padded_vocabulary());
  const auto all = [&](const Cost& cost) { return rows * (chunks * cost.per_call + a.tokens * cost.per_unit); };
  const double seconds = all(s.logits) + all(s.classifier) + all(s.head_input_gradient);
  if (config.gradients.blocks == GradientBlocks::kWhole) return seconds + all(s.head_weight_gradient);
  // In blocks the logits are computed again for every pass over the gradient.
  return seconds +
         gradient_passes(config.optimizer) * (all(s.logits) + all(s.classifier) + all(s.head_weight_gradient));
}

// Gradients of a micro-batch added to compressed sums: a product of rank r with every matrix.
double accumulate(const EngineConfig& config, const Speeds& s, const Amounts& a) {
  if (config.gradients.micro_batches == 1) return 0;
  const double elements = 12.0 * static_cast<double>(config.model.channels * config.model.channels);
  if (config.gradients.accumulation_rank > 0) {
    const double as_tokens = static_cast<double>(config.gradients.accumulation_rank);
    return a.layers * s.linear_weight_gradient.per_unit * as_tokens;
  }
  return a.layers * elements * 4 / s.bandwidth;  // the sums are read once more
}

double update(const EngineConfig& config, const Speeds& s, const Amounts& a) {
  const double rows =
      static_cast<double>(config.model.vocabulary * (config.model.tied_head ? 1 : 2) + config.model.positions);
  const double codes = config.weight_dtype == DType::kI8 ? s.encode_block : 0;
  return a.layers * (s.update_block + codes) + rows * s.update_row;
}

}  // namespace

BlockBytes block_bytes(const EngineConfig& config, Backend& backend) {
  Gpt2Config one = config.model;
  one.layers = 1;
  const std::vector<Parameter> parameters = gpt2_parameters(one);
  MemoryPlan plan;
  make_optimizer(config.optimizer, parameters, config.gradients.gradient_dtype, backend)->declare(plan);
  BlockBytes bytes;
  for (const Allocation& allocation : plan.allocations()) {
    const bool of_block = allocation.name.rfind("h.0.", 0) == 0;
    if (of_block && allocation.category == Category::kOptimizerState)
      bytes.state += static_cast<double>(allocation.bytes);
  }
  for (const Parameter& parameter : parameters) {
    if (parameter.layer != 0) continue;
    const bool codes = config.weight_dtype == DType::kI8;
    const DType dtype = codes && !parameter.matrix ? config.shapes.dtype : config.weight_dtype;
    bytes.weights += static_cast<double>(parameter.elements() * static_cast<int64_t>(dtype_size(dtype)));
    if (config.master_weights) bytes.weights += 4.0 * static_cast<double>(parameter.elements());
  }
  return bytes;
}

StepTime predict_step(const EngineConfig& config, const Speeds& speeds, const BlockBytes& bytes) {
  const Amounts a(config);
  const double decode = config.weight_dtype == DType::kI8 ? a.layers * speeds.decode_block : 0;
  const double weights = config.offload.weights ? a.layers * bytes.weights : 0;
  const double state = config.offload.state || config.offload.weights ? a.layers * bytes.state : 0;
  const double kept = config.offload.activations ? a.layers * a.tokens * static_cast<double>(config.model.channels) *
                                                       static_cast<double>(dtype_size(config.shapes.dtype))
                                                 : 0;
  const bool fused = config.gradients.kind == GradientMode::kFused;
  const double passes = fused && config.gradients.clip_norm > 0 ? 2 : 1;  // the first one measures the norm
  const double micro_batches = passes * a.micro_batches;

  StepTime time;
  time.forward =
      micro_batches * (kPerMicroBatch + together(decode + a.layers * block_forward(speeds, a),
                                                 weights / speeds.to_device + kept / speeds.to_host, speeds));
  time.head = micro_batches * head_pass(config, speeds, a);
  const double backward = micro_batches * (decode + a.layers * block_backward(config, speeds, a)) +
                          a.micro_batches * accumulate(config, speeds, a);
  const double back = micro_batches * (weights + kept) / speeds.to_device;
  const double changed = state / speeds.to_device + (state + weights) / speeds.to_host;
  if (fused) {  // updates run beside the transfers of the next blocks
    time.update = update(config, speeds, a);
    time.backward = together(backward + time.update, back + changed, speeds) - time.update;
  } else {
    time.backward = together(backward, back, speeds);
    time.update = together(update(config, speeds, a), changed + weights / speeds.to_device, speeds);
  }
  return time;
}

int64_t tokens_per_step(const EngineConfig& config) {
  return config.shapes.batch * config.shapes.sequence * config.gradients.micro_batches;
}
