// dense_sink.cpp: keeps every gradient and updates all weights after the last micro-batch. Memory: all gradients.
// Costs a pass over them for the exact global norm, and one more when that is above the clipping threshold.
#include "flora/sink_base.h"

namespace {

using Keep = GradientStorage::Keep;

class DenseSink final : public SinkBase {
 public:
  DenseSink(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store, Backend& backend)
      : SinkBase(config, optimizer, store, backend, std::vector<Keep>(store.parameters().size(), Keep::kFull), 0) {}

  void ready(const Parameter& parameter) override { storage_.add(parameter); }

  void end_step() override {
    for (const Parameter& parameter : parameters()) add_squares(storage_.gradient(parameter));
    judge_norm();
    for_each_layer([&](const Parameter& parameter) {
      const Tensor gradient = storage_.gradient(parameter);
      clip(gradient);
      update(parameter, gradient);
    });
  }
};

}  // namespace

std::unique_ptr<UpdatingSink> make_dense_sink(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store,
                                              Backend& backend) {
  return std::make_unique<DenseSink>(config, optimizer, store, backend);
}
