// compressed_sink.cpp: keeps the sum of gradients in a random projection of rank r, r / min(n, m) of their size, fresh
// every step; after the last micro-batch one parameter at a time is decompressed and updated. Costs a matmul of
// 2 r n m operations per micro-batch and one to decompress (two with clipping, which decompresses once for the norm).
#include <stdexcept>

#include "flora/sink_base.h"

namespace {

using Keep = GradientStorage::Keep;

class CompressedSink final : public SinkBase {
 public:
  CompressedSink(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store, Backend& backend)
      : SinkBase(config, optimizer, store, backend, keep_compressed(config, store.parameters(), Keep::kFull),
                 kPhaseUpdate) {}

  void declare(MemoryPlan& plan) const override {
    SinkBase::declare(plan);
    plan.add_tensor("gradient.sum_squares", Category::kWorkspace, DType::kF32, 1);
  }

  void bind(Arena& arena) override {
    SinkBase::bind(arena);
    sum_squares_ = arena.tensor("gradient.sum_squares", DType::kF32, {1});
  }

  void ready(const Parameter& parameter) override { storage_.add(parameter); }

  void end_step() override {
    gate_on_sums();
    if (clips()) {
      for (const Parameter& parameter : parameters()) add_squares(storage_.gradient(parameter));
      judge_norm();
    }
    for_each_layer([&](const Parameter& parameter) {
      const Tensor gradient = storage_.gradient(parameter);
      if (!clips()) add_squares(gradient);
      clip(gradient);
      update(parameter, gradient);
    });
  }

 private:
  // A gradient that is not finite leaves a sum that is not finite, and sums are small: the gate is known before the
  // first update and without a decompression.
  void gate_on_sums() {
    bool accumulate = false;
    for (const Parameter& parameter : parameters()) {
      backend_.sum_squares(sum_squares_, storage_.sum(parameter), accumulate);
      accumulate = true;
    }
    backend_.gate_on_finite(scalars(), sum_squares_);
  }

  Tensor sum_squares_;  // [1], of what is kept
};

}  // namespace

std::unique_ptr<UpdatingSink> make_compressed_sink(const SinkConfig& config, Optimizer& optimizer,
                                                   ParameterStore& store, Backend& backend) {
  if (config.accumulation_rank <= 0) throw std::invalid_argument("compressed gradients need an accumulation rank");
  return std::make_unique<CompressedSink>(config, optimizer, store, backend);
}
