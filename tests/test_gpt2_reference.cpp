// test_gpt2_reference.cpp: losses, logits, gradients and ten AdamW steps of the model against PyTorch's in float64:
// tests/fixtures/gpt2_reference.*, described in tests/reference/README.md.
#include <fstream>
#include <nlohmann/json.hpp>

#include "flora/gradients.h"
#include "flora/optimizers.h"
#include "tests/gpt2_bench.h"
#include "train/safetensors.h"

namespace {

constexpr double kTolerance = 1e-4;

class Gpt2Reference : public ::testing::Test {
 protected:
  Gpt2Reference()
      : tensors_("tests/fixtures/gpt2_reference.safetensors"),
        description_(nlohmann::json::parse(std::ifstream("tests/fixtures/gpt2_reference.json"))) {}

  Floats stored(const std::string& name) const {
    const TensorEntry* entry = tensors_.find(name);
    if (!entry) throw std::runtime_error("the fixture has no " + name);
    const float* begin = static_cast<const float*>(entry->data);
    return Floats(begin, begin + entry->elements());
  }

  BenchOptions options(Recompute recompute = Recompute::kNone) const {
    const auto& c = description_.at("config");
    BenchOptions o;
    o.config.vocabulary = c.at("vocab_size");
    o.config.positions = c.at("n_positions");
    o.config.layers = c.at("n_layer");
    o.config.heads = c.at("n_head");
    o.config.channels = c.at("n_embd");
    o.batch = description_.at("batch");
    o.sequence = description_.at("sequence");
    o.head_chunk = 10;
    o.recompute = recompute;
    return o;
  }

  void start(Gpt2Bench& bench) const {
    for (const Parameter& p : bench.store.parameters()) bench.set_weight(p.name, stored("initial." + p.name));
  }

  BenchBatch batch(size_t step) const {
    return BenchBatch(description_.at("tokens").at(step).get<std::vector<std::vector<int32_t>>>(),
                      options().config.vocabulary);
  }

  double loss(size_t step) const { return description_.at("losses").at(step); }

  // Without the keys' bias, whose gradient is rounding only (see the README of the references).
  static Floats without_key_bias(const std::string& name, Floats values, int64_t channels) {
    if (name.find("c_attn.bias") != std::string::npos) {
      values.erase(values.begin() + channels, values.begin() + 2 * channels);
    }
    return values;
  }

  SafetensorsReader tensors_;
  nlohmann::json description_;
};

TEST_F(Gpt2Reference, LossAndGradientsOfTheFirstStep) {
  for (const Recompute level : {Recompute::kNone, Recompute::kBlock}) {
    Gpt2Bench bench(options(level));
    start(bench);
    EXPECT_NEAR(bench.gradients(batch(0)), loss(0), kTolerance * loss(0));
    const int64_t C = bench.model.config().channels;
    for (const Parameter& p : bench.store.parameters()) {
      const Floats ours = bench.sink.gradient(p.name), theirs = stored("gradient." + p.name);
      EXPECT_LE(distance(without_key_bias(p.name, ours, C), without_key_bias(p.name, theirs, C)), kTolerance) << p.name;
      for (size_t i = 0; i < ours.size(); ++i) ASSERT_NEAR(ours[i], theirs[i], 1e-5) << p.name << " [" << i << "]";
    }
  }
}

TEST_F(Gpt2Reference, Logits) {
  BenchOptions o = options();
  o.head_chunk = 13;
  o.training = false;
  Gpt2Bench bench(o);
  start(bench);
  const Floats theirs = stored("logits");
  const int64_t V = o.config.vocabulary, T = o.sequence;
  const BenchBatch first = batch(0);
  for (int64_t b = 0; b < o.batch; ++b) {
    for (const int64_t rows : {T, int64_t{1}}) {
      const Tensor logits = bench.model.logits(&first.tokens.inputs[b * T], T, rows);
      const Floats padded = download_floats(*bench.backend, logits);
      Floats ours;
      for (int64_t i = 0; i < rows; ++i) {
        const auto row = padded.begin() + i * logits.cols();
        ours.insert(ours.end(), row, row + V);
      }
      const Floats expected(theirs.begin() + (b * T + T - rows) * V, theirs.begin() + (b * T + T) * V);
      EXPECT_LE(distance(ours, expected), kTolerance) << "sequence " << b << ", last " << rows;
    }
  }
}

TEST_F(Gpt2Reference, TenStepsOfAdamW) {
  for (const GradientMode kind : {GradientMode::kDense, GradientMode::kFused}) {
    Gpt2Bench bench(options());
    start(bench);
    const auto& adamw = description_.at("adamw");
    OptimizerConfig config;
    config.kind = OptimizerKind::kAdamW;
    config.beta1 = adamw.at("beta1");
    config.beta2 = adamw.at("beta2");
    config.eps = adamw.at("eps");
    config.weight_decay = adamw.at("weight_decay");
    const auto optimizer = make_optimizer(config, bench.store.parameters(), DType::kF32, *bench.backend);
    Gradients gradients({.kind = kind}, *optimizer, bench.store, *bench.backend);
    MemoryPlan plan;
    optimizer->declare(plan);
    gradients.declare(plan);
    Arena arena(*bench.backend, std::move(plan));
    optimizer->states().zero();
    const size_t steps = description_.at("losses").size();
    ASSERT_EQ(steps, 10u);
    for (size_t t = 0; t < steps; ++t) {
      gradients.begin_step({.step = static_cast<uint32_t>(t + 1), .lr = adamw.at("lr"), .scalars = bench.scalars});
      gradients.begin_micro_batch(0, true);
      EXPECT_NEAR(bench.train(batch(t), gradients), loss(t), kTolerance * loss(t)) << "step " << t + 1;
      gradients.end_step();
    }
    const int64_t C = bench.model.config().channels;
    for (const Parameter& p : bench.store.parameters()) {
      EXPECT_LE(distance(without_key_bias(p.name, bench.weight(p.name), C),
                         without_key_bias(p.name, stored("final." + p.name), C)),
                kTolerance)
          << p.name;
    }
  }
}

}  // namespace
