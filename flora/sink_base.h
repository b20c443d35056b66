// sink_base.h: what the three sinks share: the step's scalars, the gradient norm, the storage, and updating a weight.
// Private to flora/; the rest of the program sees sinks.h.
#pragma once

#include <memory>
#include <vector>

#include "flora/gradient_storage.h"
#include "flora/sinks.h"

class SinkBase : public UpdatingSink {
 public:
  SinkBase(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store, Backend& backend,
           const std::vector<GradientStorage::Keep>& keep, uint32_t slot_phases);

  void declare(MemoryPlan& plan) const override;
  void bind(Arena& arena) override;
  void begin_step(const StepContext& context) override;
  uint32_t variant() const override { return optimizer_.variant(); }
  void begin_micro_batch(int index, bool is_last) override;
  Target target(const Parameter& parameter) override { return storage_.target(parameter); }
  const float* gradient_squares() const override { return squares_.as<float>(); }

 protected:
  const std::vector<Parameter>& parameters() const { return store_.parameters(); }
  bool clips() const { return config_.clip_norm > 0; }
  StepScalars* scalars() const { return scalars_; }

  // gradient_squares() += sum of gradient^2, from 0 at the start of a step.
  void add_squares(Tensor gradient);

  // From the complete gradient_squares(): closes the gate when they are not finite and sets the clipping factor.
  void judge_norm();

  // gradient *= the clipping factor, with clipping on.
  void clip(Tensor gradient);

  // Runs the optimizer on one parameter; its layer need not be acquired.
  void update(const Parameter& parameter, Tensor gradient);
  void update(const Parameter& parameter, const BlockedGradient& gradient);

  // f(parameter) for all parameters, layer by layer in the order of the backward pass, each layer acquired once and
  // released as changed.
  template <typename F>
  void for_each_layer(F&& f) {
    for (int layer : layers_) {
      store_.acquire(layer, Access::kUpdate);
      for (const Parameter& parameter : parameters())
        if (parameter.layer == layer) f(parameter);
      store_.release(layer, true);
    }
  }

  SinkConfig config_;
  Backend& backend_;
  GradientStorage storage_;
  bool is_last_ = false;

 private:
  Optimizer& optimizer_;
  ParameterStore& store_;
  std::vector<int> layers_;  // the last one first, -1 at the end
  Tensor squares_;           // [1]
  bool squares_written_ = false;
  StepScalars* scalars_ = nullptr;
};

// What is kept of each parameter when compressible ones are `compressed` and others are `other`.
std::vector<GradientStorage::Keep> keep_compressed(const SinkConfig& config, const std::vector<Parameter>& parameters,
                                                   GradientStorage::Keep other);

std::unique_ptr<UpdatingSink> make_dense_sink(const SinkConfig&, Optimizer&, ParameterStore&, Backend&);
std::unique_ptr<UpdatingSink> make_fused_sink(const SinkConfig&, Optimizer&, ParameterStore&, Backend&);
std::unique_ptr<UpdatingSink> make_compressed_sink(const SinkConfig&, Optimizer&, ParameterStore&, Backend&);
