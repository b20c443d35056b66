// cost_model.cpp: see cost_model.h. Sums over the operations of a block, times the blocks; lookups, the final LayerNorm
// and the loss are left out, being far below the error of the rest.
#include "train/cost_model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <stdexcept>

#include "flora/optimizers.h"

namespace {

// Batch, launches and the scalars of a step: the part that a larger micro-batch always saves.
constexpr double kPerMicroBatch = 2e-5;

struct Work {
  double flops = 0, bytes = 0, calls = 0;
};
Work operator+(const Work& a, const Work& b) { return {a.flops + b.flops, a.bytes + b.bytes, a.calls + b.calls}; }
Work operator*(double times, const Work& w) { return {times * w.flops, times * w.bytes, times * w.calls}; }

double seconds_of(const Work& work, const Rates& rates) {
  return work.flops / rates.flops + work.bytes / rates.bytes + work.calls * rates.call;
}

bool adaptive(const OptimizerConfig& optimizer) {
  return optimizer.kind == OptimizerKind::kFlora || optimizer.kind == OptimizerKind::kAdafactor;
}

// Passes over a gradient that is computed block by block: statistics, what is projected before the rest is known
// (--residual), size of the update, update.
double gradient_passes(const OptimizerConfig& optimizer, bool compressed) {
  if (!adaptive(optimizer)) return 1;
  return 2 + (compressed && optimizer.residual ? 1 : 0) + (optimizer.clip > 0 ? 1 : 0);
}

// The operations of one micro-batch, each in a block or in the head, and of one update.
struct Operations {
  const EngineConfig& config;
  const double C = static_cast<double>(config.model.channels), T = static_cast<double>(config.shapes.sequence);
  const double sequences = static_cast<double>(config.shapes.batch), tokens = sequences * T;
  const double size = static_cast<double>(dtype_size(config.shapes.dtype));
  const double elements = 12 * C * C;  // of a block's four matrices

  // All four of a block, in one of three directions: output, gradient of the input, gradient of the matrix.
  Work products() const { return {.flops = 2 * elements * tokens, .calls = 4}; }
  // Causal attention reaches about half of the rate of a product, its backward pass 0.4 of it.
  Work attention() const { return {.flops = 2 * C * T * tokens / 0.5, .calls = 1}; }
  Work attention_backward() const { return {.flops = 5 * C * T * tokens / 0.4, .calls = 1}; }
  Work norms() const { return {.bytes = 8 * C * size * tokens, .calls = 2}; }  // with the residual sums
  Work gelu() const { return {.bytes = 8 * C * size * tokens, .calls = 1}; }
  // With the gradients of the biases of two products; those of the others come out of what is written before them.
  Work norms_backward() const { return {.bytes = 10 * C * size * tokens, .calls = 4}; }
  Work gelu_backward() const { return {.bytes = 12 * C * size * tokens, .calls = 1}; }
  Work forward() const { return products() + attention() + norms() + gelu(); }

  Work recompute() const {
    switch (config.shapes.recompute) {
      case Recompute::kNone: return {};
      case Recompute::kGelu: return gelu();
      case Recompute::kNormsGelu: return gelu() + norms();
      case Recompute::kAttention: return gelu() + norms() + attention();
      case Recompute::kBlock: break;
    }
    return forward() + (-1.0 / 3) * products();  // all but the last product, a third of the four
  }

  Work backward() const {
    const bool blocks = config.gradients.blocks == GradientBlocks::kAll;
    const double matrix_gradients = blocks ? gradient_passes(config.optimizer, config.optimizer.rank > 0) : 1;
    return recompute() + (1 + matrix_gradients) * products() + attention_backward() + norms_backward() +
           gelu_backward();
  }

  // Chunk by chunk: a product over few tokens waits for the table, or for the fp32 gradient that it is added to. The
  // number of chunks is not rounded up, so that it never grows faster than the tokens. The gradient of the input has
  // few tiles and long sums, which a library divides among as many as kShares multiprocessors.
  Work head(double tiles_at_a_time) const {
    constexpr double kShares = 4;
    const double rows = static_cast<double>(config.model.padded_vocabulary());
    const double chunk = static_cast<double>(config.shapes.head_chunk);
    const double chunks = std::max(1.0, tokens / chunk);
    const double tiles = std::max(1.0, chunk / 128) * std::max(1.0, C / 256);
    const Work product = {.flops = 2 * C * rows * tokens, .bytes = C * size * rows * chunks};
    const Work gradient = {.flops = 2 * C * rows * tokens, .bytes = 8 * C * rows * chunks};
    const Work classifier = {.bytes = 2 * size * rows * tokens};
    Work input_gradient = product;
    input_gradient.flops *= std::max(1.0, tiles_at_a_time / (kShares * tiles));
    const Work both = product + classifier + input_gradient;  // after the logits and the losses
    if (config.gradients.blocks == GradientBlocks::kWhole) return both + gradient;
    // In blocks the logits are computed again for every pass over the gradient.
    return both +
           gradient_passes(config.optimizer, config.optimizer.compress_embeddings) * (product + classifier + gradient);
  }

  // A block's gradients of a micro-batch, added to sums: of rank r by a product, in full by reading them once more. A
  // CPU's transforms (flora/projection.h) take less, here and in update(), than the products that are counted.
  Work accumulate() const {
    if (config.gradients.micro_batches == 1) return {};
    const double rank = static_cast<double>(config.gradients.accumulation_rank);
    return rank > 0 ? Work{.flops = 2 * elements * rank} : Work{.bytes = 4 * elements};
  }

  bool codes() const { return config.weight_dtype == DType::kI8; }
  Work decode() const { return codes() ? Work{.bytes = elements * (1 + size)} : Work{}; }

  Work update() const {
    const double layers = static_cast<double>(config.model.layers);
    const double state = config.optimizer.kind == OptimizerKind::kAdamW ? 16 : 4;
    const double rank = static_cast<double>(config.optimizer.rank);
    Work block = {.bytes = elements * (4 * size + state)};
    if (config.optimizer.kind == OptimizerKind::kFlora) block.flops = 4 * elements * rank;
    if (codes()) block.bytes += elements * (4 + size);
    const int64_t tables = config.model.tied_head ? 1 : 2;
    const double rows = static_cast<double>(config.model.vocabulary * tables + config.model.positions);
    return layers * block + Work{.bytes = rows * C * (16 + state)};
  }
};

// The fastest of a few calls, in seconds; the first one touches new memory, or chooses an algorithm.
double fastest(Backend& backend, const std::function<void()>& call) {
  constexpr double kEnough = 0.1;
  double best = INFINITY, total = 0;
  for (int i = 0; i < 20 && total < kEnough; ++i) {
    backend.synchronize();
    const auto start = std::chrono::steady_clock::now();
    call();
    backend.synchronize();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    total += seconds;
    if (i > 0) best = std::min(best, seconds);
  }
  return std::isfinite(best) ? best : total;
}

}  // namespace

// A GPU: an H100 at what matmuls and attention reach in practice, PCIe 4 to the host and to the others, which every
// machine has (NVLink does 450 GB/s). A CPU: a few cores, processes on one machine.
Rates nominal_rates(const EngineConfig& config, const std::string& backend) {
  if (backend == "cpu") return {.flops = 2e11, .bytes = 3e10, .transfer = 1e10, .call = 2e-6, .wire = 2e9};
  return {.copies_overlap = true,
          .flops = config.shapes.dtype == DType::kBF16 ? 4e14 : 5e13,
          .bytes = 2.5e12,
          .transfer = 2.5e10,
          .call = 5e-6,
          .wire = 2.5e10,
          .tiles = 132};
}

Rates measure_rates(const EngineConfig& config, Backend& backend) {
  const Rates nominal = nominal_rates(config, backend.name());
  // A call takes milliseconds, and its memory is small beside a run's.
  const bool cpu = backend.name() == "cpu";
  const size_t copied = (cpu ? size_t{16} : size_t{32}) << 20;
  const int64_t inner = config.model.channels, outer = std::min<int64_t>(4 * inner, 8192);
  const int64_t tokens =
      std::clamp<int64_t>((cpu ? int64_t{2'000'000'000} : int64_t{500'000'000'000}) / (inner * outer), 64, 8192);
  const DType dtype = config.shapes.dtype;
  const size_t workspace_bytes = backend.workspace_bytes({.batch = 1,
                                                          .sequence = tokens,
                                                          .channels = inner,
                                                          .heads = config.model.heads,
                                                          .vocabulary = 1,
                                                          .any_bf16 = dtype == DType::kBF16});
  Tensor in, matrix, out;
  void *from, *to, *host, *workspace;
  MemoryPlan plan;
  plan.add(&in, "in", Category::kWorkspace, dtype, {tokens, inner});
  plan.add(&matrix, "matrix", Category::kWorkspace, dtype, {inner, outer});
  plan.add(&out, "out", Category::kWorkspace, dtype, {tokens, outer});
  plan.add(&from, "from", Category::kWorkspace, copied);
  plan.add(&to, "to", Category::kWorkspace, copied);
  plan.add(&host, "host", Category::kWorkspace, copied, kPhaseAlways, true);
  plan.add(&workspace, "workspace", Category::kWorkspace, workspace_bytes);
  try {
    const Arena arena(backend, std::move(plan));
    backend.set_workspace(workspace, workspace_bytes);
    backend.fill(from, 0, copied);
    // Products of zeros are faster than those of numbers.
    for (const Tensor& tensor : {in, matrix}) {
      backend.fill_normal(tensor, 0.0f, 0.02f, {.seed = 1, .purpose = RandomPurpose::kInit, .tensor = 1});
    }
    const double flops = 2.0 * static_cast<double>(tokens * inner * outer), bytes = static_cast<double>(copied);
    Rates rates = nominal;
    rates.flops = flops / fastest(backend, [&] { backend.matmul(out, in, matrix, {}); });
    rates.bytes = 2 * bytes / fastest(backend, [&] { backend.copy(to, from, copied); });
    rates.transfer = cpu ? rates.bytes / 2 : bytes / fastest(backend, [&] { backend.copy(to, host, copied); });
    // Copies of pageable memory make the host wait.
    rates.copies_overlap = rates.copies_overlap && backend.host_memory_note().empty();
    rates.measured = true;
    backend.set_workspace(nullptr, 0);
    return rates;
  } catch (const std::runtime_error&) {
    backend.set_workspace(nullptr, 0);
    return nominal;
  }
}

BlockBytes block_bytes(const EngineConfig& config, Backend& backend) {
  EngineConfig one = config;
  one.model.layers = 1;
  one.offload = {};
  one.ranks = 1;
  one.gradients.blocks = GradientBlocks::kWhole;  // `config` may not have its micro-batches yet
  const MemoryPlan plan = Engine(one, backend).declared();
  BlockBytes bytes;
  for (const Allocation& allocation : plan.allocations()) {
    if (allocation.name.rfind("h.0.", 0) != 0) continue;
    const double size = static_cast<double>(allocation.bytes);
    if (allocation.category == Category::kWeights) bytes.weights += size;
    if (allocation.category == Category::kOptimizerState) bytes.state += size;
  }
  return bytes;
}

namespace {

// Bytes that a rank sends in a step, by the formulas of a ring: the sums of gradients, and what it takes to gather the
// blocks' weights in every pass, and, where an update needs them whole, their states.
struct Wire {
  double forward = 0, backward = 0, update = 0;
};
Wire wire_bytes(const EngineConfig& config, const BlockBytes& bytes, double passes) {
  const double layers = static_cast<double>(config.model.layers), ranks = config.ranks, others = (ranks - 1) / ranks;
  const double size = static_cast<double>(dtype_size(config.gradients.gradient_dtype));
  const bool projected = config.gradients.kind == GradientMode::kCompressed;
  const double C = static_cast<double>(config.model.channels);
  // A sum of rank r has r rows of the four matrices' longer sides, 3 + 1 + 4 + 4 times C.
  const double block =
      projected ? 4.0 * 12 * C * static_cast<double>(config.gradients.accumulation_rank) : size * 12 * C * C;
  const double tables = 4.0 * static_cast<double>(config.model.vocabulary * (config.model.tied_head ? 1 : 2)) * C;
  Wire wire = {.backward = 2 * others * (layers * block + tables)};
  if (!is_spread(config)) return wire;
  wire.forward = passes * others * layers * bytes.weights;
  wire.backward += passes * others * layers * bytes.weights;
  if (!updates_parts(config)) {
    const bool dense = config.gradients.kind != GradientMode::kFused;
    wire.update = others * layers * (bytes.state + (dense ? bytes.weights : 0));
  }
  return wire;
}

}  // namespace

double predict_step(const EngineConfig& config, const Rates& rates, const BlockBytes& bytes) {
  const Operations step{config};
  const double layers = static_cast<double>(config.model.layers);
  const double weights = config.offload.weights ? layers * bytes.weights : 0;
  const double state = config.offload.state || config.offload.weights ? layers * bytes.state : 0;
  const double kept = config.offload.activations ? layers * step.tokens * step.C * step.size : 0;
  const bool fused = config.gradients.kind == GradientMode::kFused;
  const double micro_batches = config.gradients.micro_batches;
  const double passes = micro_batches * (fused && config.gradients.clip_norm > 0 ? 2 : 1);  // the first for the norm
  const Wire wire = config.ranks > 1 ? wire_bytes(config, bytes, passes) : Wire{};
  // Work, and bytes that move meanwhile: to and from the host, and to other ranks, whose link is another one.
  const auto seconds = [&](const Work& work, double moved, double sent) {
    const double compute = seconds_of(work, rates), transfer = moved / rates.transfer;
    const double others = config.ranks > 1 ? sent / rates.wire : 0;
    return std::max(rates.copies_overlap ? std::max(compute, transfer) : compute + transfer, others);
  };
  const Work forward = layers * (step.decode() + step.forward());
  const Work backward =
      passes * layers * (step.decode() + step.backward()) + micro_batches * layers * step.accumulate();
  const double back = passes * (weights + kept), changed = 2 * state + weights;
  double total = passes * (kPerMicroBatch + seconds(forward, weights + kept, wire.forward / passes) +
                           seconds(step.head(rates.tiles), 0, 0));
  if (fused) {  // updates run beside the transfers of the next blocks
    total += seconds(backward + step.update(), back + changed, wire.backward + wire.update);
  } else {
    total += seconds(backward, back, wire.backward) + seconds(step.update(), changed + weights, wire.update);
  }
  return total;
}

int64_t tokens_per_step(const EngineConfig& config) {
  return config.ranks * config.shapes.batch * config.shapes.sequence * config.gradients.micro_batches;
}
