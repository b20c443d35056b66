// memory_advice.cpp: see memory_advice.h. Settings are tried on top of each other: block recomputation, smaller
// micro-batches, Flora with the fused backward pass, 8-bit states.
#include "train/memory_advice.h"

#include <algorithm>
#include <vector>

#include "train/metrics.h"

namespace {

size_t planned_bytes(const EngineConfig& config, Backend& backend) {
  return Engine(config, backend).plan().device_bytes();
}

void shrink_micro_batch(EngineConfig& config, int64_t batch) {
  config.sink.micro_batches *= static_cast<int>(config.shapes.batch / batch);
  config.shapes.batch = batch;
  config.shapes.head_chunk = std::min(config.shapes.head_chunk, batch * config.shapes.sequence);
}

// Flags that make it fit, and the bytes they lead to; empty when nothing does.
std::string settings_that_fit(EngineConfig config, Backend& backend, size_t available, size_t& bytes) {
  std::string flags;
  const auto fits = [&] { return (bytes = planned_bytes(config, backend)) <= available; };
  if (config.shapes.recompute != Recompute::kBlock) {
    config.shapes.recompute = Recompute::kBlock;
    flags += " --recompute block";
    if (fits()) return flags;
  }
  const EngineConfig whole = config;
  const auto with_smaller_batches = [&](const std::string& before) {
    const int64_t full = config.shapes.batch;
    for (int64_t batch = full / 2; batch >= 1; batch /= 2) {
      EngineConfig smaller = config;
      shrink_micro_batch(smaller, batch);
      if (full % batch == 0 && (bytes = planned_bytes(smaller, backend)) <= available)
        return before + " --micro-batch " + std::to_string(batch);
      smaller.sink.micro_batches = 1;  // fewer tokens a step, and no sums of gradients
      if ((bytes = planned_bytes(smaller, backend)) <= available)
        return before + " --micro-batch " + std::to_string(batch) + " --tokens-per-step " +
               std::to_string(batch * config.shapes.sequence);
    }
    return std::string();
  };
  std::string found = with_smaller_batches(flags);
  if (!found.empty()) return found;
  if (config.optimizer.kind != OptimizerKind::kFlora || config.sink.kind != SinkKind::kFused) {
    config.optimizer.kind = OptimizerKind::kFlora;
    config.optimizer.rank = std::max<int64_t>(config.optimizer.rank, 256);
    config.sink.kind = SinkKind::kFused;
    config.sink.clip_norm = 0;
    config.master_weights = false;
    flags += " --optimizer flora --gradients fused";
    if (whole.master_weights) flags += " --master-weights none";
    if (fits()) return flags;
    found = with_smaller_batches(flags);
    if (!found.empty()) return found;
  }
  if (config.optimizer.state_dtype != DType::kI8) {
    config.optimizer.state_dtype = DType::kI8;
    flags += " --state-dtype int8";
    if (fits()) return flags;
    return with_smaller_batches(flags);
  }
  return "";
}

}  // namespace

std::string memory_advice(const EngineConfig& config, Backend& backend, size_t available) {
  const MemoryPlan plan = Engine(config, backend).plan();
  std::string text = "out of memory: the plan is " + format_bytes(plan.device_bytes()) + " (";
  const std::vector<size_t> categories = plan.bytes_by_category();
  for (int i = 0; i < kCategoryCount; ++i) {
    text += (i > 0 ? ", " : "") + std::string(category_name(static_cast<Category>(i))) + " " +
            format_bytes(categories[static_cast<size_t>(i)]);
  }
  text += "), " + format_bytes(available) + " are free; ";
  size_t bytes = 0;
  const std::string flags = settings_that_fit(config, backend, available, bytes);
  if (flags.empty()) return text + "no setting of this model fits, a smaller --model is needed";
  return text + "with" + flags + " it needs " + format_bytes(bytes);
}
