// gpt2_bench.h: a GPT-2 on a backend with nothing around it: weights, one micro-batch, and a sink that keeps every
// gradient and checks the protocol of gradients.h while it does.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "data/token_loader.h"
#include "flora/gradients.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"
#include "model/gpt2.h"
#include "model/weights.h"
#include "tests/backends.h"

using Floats = std::vector<float>;

inline void upload_floats(Backend& backend, Tensor out, const Floats& values) {
  ASSERT_EQ(out.elements(), static_cast<int64_t>(values.size()));
  if (out.dtype == DType::kF32) {
    backend.copy(out.data, values.data(), out.bytes());
    backend.synchronize();
    return;
  }
  std::vector<bf16> rounded(values.size());
  std::transform(values.begin(), values.end(), rounded.begin(), from_float<bf16>);
  backend.copy(out.data, rounded.data(), out.bytes());
  backend.synchronize();
}

inline Floats download_floats(Backend& backend, Tensor in) {
  Floats values(static_cast<size_t>(in.elements()));
  if (in.dtype == DType::kF32) {
    backend.copy(values.data(), in.data, in.bytes());
    backend.synchronize();
    return values;
  }
  std::vector<bf16> raw(values.size());
  backend.copy(raw.data(), in.data, in.bytes());
  backend.synchronize();
  std::transform(raw.begin(), raw.end(), values.begin(), [](bf16 x) { return to_float(x); });
  return values;
}

// ||values - expected|| / ||expected||; NaN where a value is one, and a NaN passes no comparison.
inline double distance(const Floats& values, const Floats& expected) {
  if (values.size() != expected.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = values[i], b = expected[i];
    difference += (a - b) * (a - b);
    norm += b * b;
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// Keeps every gradient of a step. Buffers start as NaN, so that a gradient that is added to nothing is seen.
class CapturingSink final : public GradientSink {
 public:
  CapturingSink(const std::vector<Parameter>& parameters, DType dtype, Backend& backend)
      : parameters_(parameters), dtype_(dtype), backend_(backend) {}

  void declare(MemoryPlan& plan) {
    for (const Parameter& p : parameters_)
      plan.add(&buffers_[p.name], "gradient." + p.name, Category::kGradients, dtype_of(p), {p.padded_rows, p.cols});
  }
  void poison() {
    for (const auto& [name, padded] : buffers_) backend_.fill(padded.data, 0xff, padded.bytes());
  }

  void begin_step() { written_.clear(), ready_.clear(); }

  Target target(const Parameter& p) override {
    EXPECT_FALSE(ready_.count(p.name)) << p.name << " is asked for after it was ready";
    open_.insert(p.name);
    int matrices = 0;
    for (const Parameter& other : parameters_) matrices += open_.count(other.name) && other.matrix && !other.long_lived;
    EXPECT_LE(matrices, 1) << "two matrices are open beside " << p.name;
    return {p.tensor(buffers_.at(p.name)), !written_.insert(p.name).second};
  }

  void ready(const Parameter& p) override {
    EXPECT_TRUE(open_.erase(p.name)) << p.name << " is ready without a target";
    EXPECT_TRUE(ready_.insert(p.name).second) << p.name << " is ready twice";
  }

  void end_step() {
    EXPECT_TRUE(open_.empty()) << *open_.begin() << " was never ready";
    EXPECT_EQ(ready_.size(), parameters_.size());
  }

  Floats gradient(const std::string& name) const {
    return download_floats(backend_, parameter(name).tensor(buffers_.at(name)));
  }

  // What is in the rows behind the gradient.
  Floats padding(const std::string& name) const {
    const Parameter& p = parameter(name);
    return download_floats(backend_, buffers_.at(name).slice(p.rows, p.padded_rows - p.rows));
  }

 private:
  DType dtype_of(const Parameter& p) const { return p.long_lived ? DType::kF32 : dtype_; }
  const Parameter& parameter(const std::string& name) const {
    for (const Parameter& p : parameters_)
      if (p.name == name) return p;
    throw std::logic_error("no parameter " + name);
  }

  std::vector<Parameter> parameters_;
  DType dtype_;
  Backend& backend_;
  std::map<std::string, Tensor> buffers_;  // with padding rows
  std::set<std::string> written_, open_, ready_;
};

// Inputs and targets of B sequences, grouped for the embedding.
struct BenchBatch {
  int64_t batch, sequence;
  MicroBatch tokens;

  // rows[b] holds sequence + 1 tokens.
  BenchBatch(const std::vector<std::vector<int32_t>>& rows, int64_t vocabulary)
      : batch(static_cast<int64_t>(rows.size())), sequence(static_cast<int64_t>(rows[0].size()) - 1) {
    for (const auto& row : rows) {
      tokens.inputs.insert(tokens.inputs.end(), row.begin(), row.end() - 1);
      tokens.targets.insert(tokens.targets.end(), row.begin() + 1, row.end());
    }
    group_tokens(tokens, vocabulary);
  }

  static BenchBatch random(int64_t batch, int64_t sequence, int64_t vocabulary, uint32_t seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(vocabulary) - 1);
    std::vector<std::vector<int32_t>> rows(static_cast<size_t>(batch));
    for (auto& row : rows) {
      for (int64_t t = 0; t <= sequence; ++t) row.push_back(token(generator));
    }
    return BenchBatch(rows, vocabulary);
  }

  HostBatch host() const {
    return {batch,
            sequence,
            tokens.inputs.data(),
            tokens.targets.data(),
            tokens.group_ids.data(),
            tokens.group_starts.data(),
            tokens.group_positions.data()};
  }
};

struct BenchOptions {
  Gpt2Config config;
  int64_t batch = 1, sequence = 1, head_chunk = 1;
  DType dtype = DType::kF32;
  Recompute recompute = Recompute::kNone;
  bool training = true;
};

class Gpt2Bench {
 public:
  explicit Gpt2Bench(const BenchOptions& o)
      : backend(make_test_backend()),
        store(gpt2_parameters(o.config), {.dtype = o.dtype}, *backend),
        model(o.config, {o.batch, o.sequence, o.head_chunk, o.dtype, o.recompute, o.training}, store, *backend),
        sink(store.parameters(), o.dtype, *backend) {
    MemoryPlan plan;
    store.declare(plan);
    model.declare(plan);
    sink.declare(plan);
    plan.add(&loss_, "loss", Category::kWorkspace, DType::kF32, {1});
    plan.add(&scalars, "scalars", Category::kWorkspace, sizeof(StepScalars));
    const size_t workspace_bytes = backend->workspace_bytes({.batch = o.batch,
                                                             .sequence = o.sequence,
                                                             .channels = o.config.channels,
                                                             .heads = o.config.heads,
                                                             .vocabulary = o.config.padded_vocabulary(),
                                                             .any_bf16 = o.dtype == DType::kBF16});
    void* workspace = nullptr;
    plan.add(&workspace, "workspace", Category::kWorkspace, workspace_bytes);
    arena_ = std::make_unique<Arena>(*backend, std::move(plan));
    backend->fill(workspace, 0xff, workspace_bytes);
    backend->set_workspace(workspace, workspace_bytes);
    store.zero_padding();
    sink.poison();
  }

  void set_weight(const std::string& name, const Floats& values) {
    upload_floats(*backend, store.weight(model.parameter(name)), values);
  }
  Floats weight(const std::string& name) { return download_floats(*backend, store.weight(model.parameter(name))); }

  // Random weights of every kind, biases and LayerNorms included, the same for the same seed, all of them numbers that
  // bf16 can hold.
  void randomize(uint32_t seed, float stddev = 0.1f) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0f, stddev);
    for (const Parameter& p : store.parameters()) {
      const bool norm_scale = p.name.find("ln_") != std::string::npos && p.name.find("weight") != std::string::npos;
      Floats values(static_cast<size_t>(p.elements()));
      for (float& value : values) value = to_float(from_float<bf16>(normal(generator) + (norm_scale ? 1.0f : 0.0f)));
      set_weight(p.name, values);
    }
  }

  float loss() { return download_floats(*backend, loss_)[0]; }

  // One step of one micro-batch into the capturing sink; returns the loss.
  float gradients(const BenchBatch& batch, float loss_scale = 1.0f) {
    const StepScalars fresh;
    backend->copy(scalars, &fresh, sizeof fresh);
    sink.begin_step();
    model.load(batch.host());
    model.train(sink, loss_, false, loss_scale, scalars);
    sink.end_step();
    return loss();
  }

  // The same through another sink, which is told of the step by the caller.
  float train(const BenchBatch& batch, GradientSink& other) {
    model.load(batch.host());
    model.train(other, loss_, false, 1.0f, scalars);
    return loss();
  }

  float evaluate(const BenchBatch& batch) {
    model.evaluate(batch.host(), loss_, false, 1.0f);
    return loss();
  }

  std::unique_ptr<Backend> backend;
  WeightStore store;
  Gpt2 model;
  CapturingSink sink;
  StepScalars* scalars = nullptr;

 private:
  std::unique_ptr<Arena> arena_;  // released before the backend it came from
  Tensor loss_;
};
