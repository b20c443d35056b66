// fake_model.h: a model without arithmetic for tests of optimizers and gradients: parameters shaped like GPT-2's,
// random gradients, and a step that hands them over in the order of the real backward pass. Memory comes from an arena
// that is poisoned with NaN, so that anything used before it is written shows up.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flora/gradients.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"
#include "tests/backends.h"

class FakeStore final : public ParameterStore {
 public:
  FakeStore(std::vector<Parameter> parameters, DType dtype, bool masters)
      : parameters_(std::move(parameters)), dtype_(dtype), masters_(masters), held_(16, 0) {}

  void declare(MemoryPlan& plan) {
    weights_.resize(parameters_.size()), master_copies_.resize(parameters_.size());
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& p = parameters_[i];
      plan.add(&weights_[i], p.name, Category::kWeights, dtype_, {p.padded_rows, p.cols});
      if (masters_)
        plan.add(&master_copies_[i], p.name + ".master", Category::kWeights, p.tensor(nullptr, DType::kF32));
    }
  }

  void randomize(Backend& backend, uint64_t seed) {
    for (const Parameter& p : parameters_) {
      const size_t i = static_cast<size_t>(p.index);
      backend.fill_normal(p.tensor(weights_[i]), 0, 0.02f, {.seed = seed, .tensor = p.hash()});
      if (masters_) backend.convert(master_copies_[i], p.tensor(weights_[i]));
    }
  }

  const std::vector<Parameter>& parameters() const override { return parameters_; }
  void acquire(int layer, Access = Access::kRead) override { ++held_.at(static_cast<size_t>(layer + 1)); }
  void release(int layer, bool changed) override {
    EXPECT_GT(held_.at(static_cast<size_t>(layer + 1))--, 0);
    changed_ += changed;
  }
  Tensor weight(const Parameter& p) override {
    EXPECT_GT(held_.at(static_cast<size_t>(p.layer + 1)), 0) << p.name << " is used without acquire()";
    return p.tensor(weights_.at(static_cast<size_t>(p.index)));
  }
  Tensor padded_weight(const Parameter& p) override { return weight(p); }
  Tensor stored(const Parameter& p) override { return weight(p); }
  DType dtype(const Parameter&) const override { return dtype_; }
  Tensor master(const Parameter& p) override { return master_copies_.at(static_cast<size_t>(p.index)); }
  int changed() const { return changed_; }

 private:
  std::vector<Parameter> parameters_;
  DType dtype_;
  bool masters_;
  std::vector<int> held_;
  int changed_ = 0;
  std::vector<Tensor> weights_, master_copies_;
};

struct FakeOptions {
  OptimizerConfig optimizer;
  GradientConfig gradients;
  DType weight_dtype = DType::kF32;
  bool masters = false;
  int threads = 2;
  uint32_t poisoned_step = 0;  // in this step one gradient holds an infinity
  int layers = 2;
};

class FakeModel {
 public:
  explicit FakeModel(const FakeOptions& options)
      : options_(options),
        backend_(make_test_backend(test_backend_name(), options.threads)),
        store_(make_parameters(options.layers), options.weight_dtype, options.masters),
        optimizer_(make_optimizer(options.optimizer, store_.parameters(), options.gradients.gradient_dtype, *backend_)),
        gradients_(options.gradients, *optimizer_, store_, *backend_) {
    MemoryPlan plan;
    const size_t workspace_bytes = backend_->workspace_bytes(
        {.batch = 1, .sequence = 16, .channels = 24, .heads = 2, .vocabulary = 150, .any_bf16 = true});
    void* workspace = nullptr;
    plan.add(&scalars_, "scalars", Category::kWorkspace, sizeof(StepScalars));
    plan.add(&workspace, "workspace", Category::kWorkspace, workspace_bytes);
    store_.declare(plan);
    optimizer_->declare(plan);
    gradients_.declare(plan);
    arena_ = std::make_unique<Arena>(*backend_, std::move(plan));
    char* const base = reinterpret_cast<char*>(scalars_) - arena_->plan().find("scalars")->offset;
    backend_->fill(base, 0xff, arena_->plan().device_bytes());
    backend_->set_workspace(workspace, workspace_bytes);
    store_.randomize(*backend_, 4);
    optimizer_->states().zero();
  }

  void step(uint32_t t, float lr = 0.01f) {
    if (gradients_.needs_norm_pass()) pass(t, lr, true);
    pass(t, lr, false);
    backend_->synchronize();
  }

  // All weights (masters where there are any) and all states, bit by bit.
  std::vector<uint8_t> weight_bits() {
    std::vector<uint8_t> bits;
    for (const Parameter& p : store_.parameters()) append(bits, weight(p));
    return bits;
  }
  std::vector<uint8_t> state_bits() {
    std::vector<uint8_t> bits;
    for (const StateTensor& s : optimizer_->state()) append(bits, s.tensor);
    return bits;
  }

  // Weights as float64, one after another.
  std::vector<double> weights() {
    std::vector<double> values;
    for (const Parameter& p : store_.parameters()) {
      const Tensor w = weight(p);
      const std::vector<uint8_t> bits = bits_of(w.data, w.bytes());
      for (int64_t i = 0; i < w.elements(); ++i) {
        bf16 half{};
        float single = 0;
        if (w.dtype == DType::kF32) std::memcpy(&single, &bits[static_cast<size_t>(i) * sizeof single], sizeof single);
        if (w.dtype == DType::kBF16) std::memcpy(&half, &bits[static_cast<size_t>(i) * sizeof half], sizeof half);
        values.push_back(w.dtype == DType::kF32 ? single : to_float(half));
      }
    }
    return values;
  }

  Arena& arena() { return *arena_; }
  Backend& backend() { return *backend_; }
  Optimizer& optimizer() { return *optimizer_; }
  Gradients& gradients() { return gradients_; }
  FakeStore& store() { return store_; }
  StepScalars scalars() const {
    StepScalars scalars;
    std::memcpy(&scalars, bits_of(scalars_, sizeof scalars).data(), sizeof scalars);
    return scalars;
  }
  float gradient_squares() const {
    float value;
    std::memcpy(&value, bits_of(gradients_.gradient_squares(), sizeof value).data(), sizeof value);
    return value;
  }
  // What lies in the device's memory.
  std::vector<uint8_t> bits_of(const void* memory, size_t bytes) const {
    std::vector<uint8_t> bits(bytes);
    backend_->copy(bits.data(), memory, bytes);
    backend_->synchronize();
    return bits;
  }

  // The gradient of one micro-batch; the tied embedding's comes in two parts.
  static std::vector<float> gradient(const Parameter& p, uint32_t t, int micro_batch, int part) {
    std::mt19937 generator(p.hash() + 977 * t + 31 * static_cast<uint32_t>(micro_batch) + static_cast<uint32_t>(part));
    std::normal_distribution<float> normal(0.0f, 0.01f);
    std::vector<float> values(static_cast<size_t>(p.elements()));
    for (float& value : values) value = normal(generator);
    return values;
  }

  static std::vector<Parameter> make_parameters(int layers = 2) {
    constexpr int64_t kChannels = 24, kVocabulary = 150;
    std::vector<Parameter> parameters;
    const auto add = [&](const std::string& name, int layer, int64_t rows, int64_t cols) {
      Parameter p;
      p.index = static_cast<int>(parameters.size());
      p.name = name;
      p.layer = layer;
      p.matrix = p.decay = rows > 1;
      p.rows = p.padded_rows = rows;
      p.cols = cols;
      parameters.push_back(p);
    };
    add("wte.weight", -1, kVocabulary, kChannels);
    parameters.back().padded_rows = 256;
    parameters.back().embedding = parameters.back().long_lived = true;
    add("wpe.weight", -1, 20, kChannels);
    parameters.back().embedding = true;
    for (int layer = 0; layer < layers; ++layer) {
      const std::string h = "h." + std::to_string(layer) + ".";
      add(h + "ln_1.weight", layer, 1, kChannels);
      add(h + "ln_1.bias", layer, 1, kChannels);
      add(h + "attn.c_attn.weight", layer, kChannels, 3 * kChannels);
      add(h + "attn.c_attn.bias", layer, 1, 3 * kChannels);
      add(h + "attn.c_proj.weight", layer, kChannels, kChannels);
      add(h + "attn.c_proj.bias", layer, 1, kChannels);
      add(h + "mlp.c_fc.weight", layer, kChannels, 4 * kChannels);
      add(h + "mlp.c_proj.weight", layer, 4 * kChannels, kChannels);
    }
    add("ln_f.weight", -1, 1, kChannels);
    add("ln_f.bias", -1, 1, kChannels);
    return parameters;
  }

 private:
  void pass(uint32_t t, float lr, bool norm_pass) {
    const int count = options_.gradients.micro_batches;
    gradients_.begin_step({.step = t, .lr = lr, .scalars = scalars_, .norm_pass = norm_pass});
    for (int i = 0; i < count; ++i) {
      gradients_.begin_micro_batch(i, i + 1 == count);
      backward(t, i);
    }
    gradients_.end_step();
  }

  // Head, final LayerNorm, blocks from the last to the first, lookup.
  void backward(uint32_t t, int micro_batch) {
    const std::vector<Parameter>& all = store_.parameters();
    write(all[0], t, micro_batch, 0);
    hand_over(t, micro_batch, {all[all.size() - 2], all[all.size() - 1]});
    for (int layer = options_.layers - 1; layer >= 0; --layer) {
      const Parameter* block = &all[2 + 8 * static_cast<size_t>(layer)];
      store_.acquire(layer, Access::kRead);
      for (int matrix : {7, 6, 4, 5, 2, 3}) hand_over(t, micro_batch, {block[matrix]});
      hand_over(t, micro_batch, {block[0], block[1]});
      store_.release(layer, true);
    }
    write(all[0], t, micro_batch, 1);
    write(all[1], t, micro_batch, 0);
    gradients_.ready(all[0]);
    gradients_.ready(all[1]);
  }

  void hand_over(uint32_t t, int micro_batch, const std::vector<Parameter>& parameters) {
    for (const Parameter& p : parameters) write(p, t, micro_batch, 0);
    for (const Parameter& p : parameters) gradients_.ready(p);
  }

  void write(const Parameter& p, uint32_t t, int micro_batch, int part) {
    const GradientSink::Target target = gradients_.target(p);
    std::vector<float> values = gradient(p, t, micro_batch, part);
    if (t == options_.poisoned_step && p.name == "h.0.mlp.c_fc.weight") values[5] = INFINITY;
    ASSERT_EQ(target.tensor.elements(), p.elements());
    std::vector<uint8_t> bits = bits_of(target.tensor.data, target.tensor.bytes());
    const auto add = [&](auto element, size_t i) {
      std::memcpy(&element, &bits[i * sizeof element], sizeof element);
      element = from_float<decltype(element)>(target.accumulate ? to_float(element) + values[i] : values[i]);
      std::memcpy(&bits[i * sizeof element], &element, sizeof element);
    };
    for (size_t i = 0; i < values.size(); ++i) {
      if (target.tensor.dtype == DType::kF32) {
        add(float{}, i);
      } else {
        add(bf16{}, i);
      }
    }
    backend_->copy(target.tensor.data, bits.data(), bits.size());
  }

  Tensor weight(const Parameter& p) {
    store_.acquire(p.layer, Access::kRead);
    const Tensor w = options_.masters ? store_.master(p) : store_.weight(p);
    store_.release(p.layer, false);
    return w;
  }

  void append(std::vector<uint8_t>& bits, const Tensor& t) const {
    const auto add = [&](const void* memory, size_t bytes) {
      const std::vector<uint8_t> part = bits_of(memory, bytes);
      bits.insert(bits.end(), part.begin(), part.end());
    };
    add(t.data, t.bytes());
    if (t.scales) add(t.scales, static_cast<size_t>(quant_blocks(t.elements())) * sizeof(float));
  }

  FakeOptions options_;
  std::unique_ptr<Backend> backend_;
  FakeStore store_;
  std::unique_ptr<Optimizer> optimizer_;
  Gradients gradients_;
  std::unique_ptr<Arena> arena_;
  StepScalars* scalars_ = nullptr;
};
