// training_run.h: steps of a small GPT-2 through the engine, as the trainer runs it, and what came of them.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/backends.h"
#include "tests/gpt2_bench.h"
#include "train/engine.h"

inline constexpr uint32_t kSteps = 13;
inline constexpr int64_t kBatch = 2, kSequence = 33, kVocabulary = 131;

extern "C" void __asan_init() __attribute__((weak));

// On the emulated GPU and under the address sanitizer everything takes many times as long: there a test leaves out what
// repeats itself.
inline bool takes_long() {
  static const bool emulated = make_test_backend()->description().find("CUDA on CPU") != std::string::npos;
  return emulated || &__asan_init != nullptr;
}

// A head of 64, so that bf16 attention runs on tensor cores.
inline EngineConfig small_config(DType dtype) {
  EngineConfig config;
  config.model.vocabulary = kVocabulary;
  config.model.positions = 40;
  config.model.layers = 2;
  config.model.heads = 1;
  config.model.channels = 64;
  config.shapes = {.batch = kBatch, .sequence = kSequence, .head_chunk = 20, .dtype = dtype};
  config.weight_dtype = dtype;
  config.optimizer.seed = config.gradients.seed = 5;
  config.optimizer.state_dtype = dtype;
  config.optimizer.rank = 8;
  config.optimizer.kappa = 4;  // three changes of projection
  config.optimizer.weight_decay = 0.1f;
  config.gradients.gradient_dtype = dtype;
  return config;
}

// Several layers, and everything that happens to them in few steps.
inline EngineConfig deep_config(int layers, DType dtype, OptimizerKind optimizer = OptimizerKind::kFlora,
                                GradientMode mode = GradientMode::kFused) {
  EngineConfig config = small_config(dtype);
  config.model.layers = layers;
  config.optimizer.kind = optimizer;
  config.optimizer.kappa = 2;
  config.gradients.kind = mode;
  config.shapes.recompute = Recompute::kBlock;
  if (mode == GradientMode::kCompressed) {
    config.gradients.accumulation_rank = 16;
    config.gradients.micro_batches = 2;
  }
  return config;
}

struct Outcome {
  std::vector<float> losses, norms;
  std::vector<uint8_t> bits;  // of all weights and optimizer states
  size_t planned = 0, allocated = 0;
  int64_t bytes_sent = 0;
};

inline void append(std::vector<uint8_t>& bits, Backend& backend, const Tensor& tensor) {
  const auto add = [&](const void* memory, size_t bytes) {
    const size_t begin = bits.size();
    bits.resize(begin + bytes);
    backend.copy(&bits[begin], memory, bytes);
    backend.synchronize();
  };
  add(tensor.data, tensor.bytes());
  if (tensor.scales) add(tensor.scales, static_cast<size_t>(quant_blocks(tensor.elements())) * sizeof(float));
}

// Micro-batch i of step t: a walk over the vocabulary with a little noise, which can be learned. The device takes its
// copy before the next one is made.
class Batches {
 public:
  // Of several ranks each draws all micro-batches and takes its own.
  explicit Batches(int rank = 0, int ranks = 1) : before_(rank), after_(ranks - 1 - rank) {}

  HostBatch next() {
    for (int i = 0; i < owed_ + before_; ++i) draw();
    owed_ = after_;
    draw();
    return batch_->host();
  }

 private:
  void draw() {
    std::vector<std::vector<int32_t>> rows(kBatch);
    for (auto& row : rows) {
      int32_t token = static_cast<int32_t>(generator_() % kVocabulary);
      for (int64_t i = 0; i <= kSequence; ++i) {
        row.push_back(token);
        token = static_cast<int32_t>((static_cast<uint32_t>(token) + 1 + generator_() % 2) % kVocabulary);
      }
    }
    batch_ = std::make_unique<BenchBatch>(rows, kVocabulary);
  }

  int before_, after_, owed_ = 0;
  std::mt19937 generator_{17};
  std::unique_ptr<BenchBatch> batch_;
};

// after_step(engine) is called between the steps.
inline Outcome train(Backend& backend, Communicator& communicator, const EngineConfig& config, float lr, uint32_t steps,
                     const std::function<void(Engine&)>& after_step = {}) {
  Engine engine(config, backend, communicator);
  engine.allocate();
  Outcome outcome;
  outcome.planned = engine.plan().device_bytes();
  outcome.allocated = backend.allocated_bytes();
  engine.model().initialize(3);
  Batches batches(communicator.rank(), communicator.size());
  for (uint32_t t = 1; t <= steps; ++t) {
    const StepResult result = engine.step(t, lr, [&](int) { return batches.next(); });
    EXPECT_TRUE(result.applied);
    outcome.losses.push_back(result.loss);
    outcome.norms.push_back(result.grad_norm);
    if (after_step) after_step(engine);
  }
  outcome.bytes_sent = communicator.bytes_sent();
  HeldLayer<ParameterStore> held(engine.store());
  for (const Parameter& p : engine.store().parameters()) {
    held.hold(p.layer, Access::kRead);
    append(outcome.bits, backend, engine.store().stored(p));
  }
  StateStore& states = engine.optimizer().states();
  for (size_t i = 0; i < states.list().size(); ++i) {
    states.hold(states.list()[i].layer, Access::kRead);
    append(outcome.bits, backend, states.get(static_cast<int>(i)));
  }
  return outcome;
}

inline Outcome train(const std::string& backend_name, const EngineConfig& config, float lr, uint32_t steps = kSteps,
                     const std::function<void(Engine&)>& after_step = {}) {
  const std::unique_ptr<Backend> backend = make_test_backend(backend_name);
  return train(*backend, alone(), config, lr, steps, after_step);
}
