// test_gpt2.cpp: what must hold for the model whatever its weights are: recompute levels give the same bits, chunks of
// the head the same numbers, an untied head its own gradient, bf16 nearly the gradients of fp32.
#include "model/gpt2.h"

#include "tests/gpt2_bench.h"

namespace {

// Odd sizes: a head of 20 (24 where a GPU wants a multiple of 8 channels), a vocabulary and a token count that are
// multiples of nothing.
Gpt2Config odd_config() {
  Gpt2Config config;
  config.vocabulary = 131, config.positions = 23, config.layers = 3, config.heads = 3;
  config.channels = test_backend_name() == "cpu" ? 60 : 72;
  return config;
}

BenchOptions odd_options(DType dtype = DType::kF32) {
  return {.config = odd_config(), .batch = 3, .sequence = 17, .head_chunk = 51, .dtype = dtype};
}

BenchBatch odd_batch() { return BenchBatch::random(3, 17, 131, 7); }

class Gpt2Precision : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, Gpt2Precision, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(Gpt2Precision, RecomputeLevelsGiveTheSameBits) {
  BenchOptions options = odd_options(GetParam());
  Gpt2Bench reference(options);
  reference.randomize(1);
  const BenchBatch batch = odd_batch();
  const float loss = reference.gradients(batch);
  ASSERT_TRUE(std::isfinite(loss));
  for (const Recompute level : {Recompute::kGelu, Recompute::kNormsGelu, Recompute::kAttention, Recompute::kBlock}) {
    options.recompute = level;
    Gpt2Bench bench(options);
    bench.randomize(1);
    EXPECT_EQ(bench.gradients(batch), loss);
    for (const Parameter& p : bench.store.parameters()) {
      EXPECT_EQ(bench.sink.gradient(p.name), reference.sink.gradient(p.name)) << p.name << ", level " << int(level);
    }
  }
}

TEST_P(Gpt2Precision, ChunksOfTheHeadAgree) {
  BenchOptions options = odd_options(GetParam());
  Gpt2Bench whole(options);
  whole.randomize(2);
  const BenchBatch batch = odd_batch();
  const float loss = whole.gradients(batch);
  const double tolerance = GetParam() == DType::kF32 ? 1e-5 : 1e-2;
  for (const int64_t chunk : {1, 7, 16, 50}) {
    options.head_chunk = chunk;
    Gpt2Bench bench(options);
    bench.randomize(2);
    EXPECT_NEAR(bench.gradients(batch), loss, tolerance * loss);
    for (const Parameter& p : bench.store.parameters()) {
      EXPECT_LE(distance(bench.sink.gradient(p.name), whole.sink.gradient(p.name)), tolerance) << p.name;
    }
  }
}

// The head's product writes the padding rows of its gradient, too; the lookup adds nothing to them.
TEST_P(Gpt2Precision, PaddingRowsOfTheHeadGetNoGradient) {
  BenchOptions options = odd_options(GetParam());
  options.head_chunk = 20;
  for (const bool tied : {true, false}) {
    options.config.tied_head = tied;
    Gpt2Bench bench(options);
    bench.randomize(2);
    bench.gradients(odd_batch());
    const std::string head = tied ? "wte.weight" : "lm_head.weight";
    const Floats padding = bench.sink.padding(head);
    ASSERT_EQ(padding.size(), static_cast<size_t>((256 - 131) * options.config.channels));
    EXPECT_EQ(padding, Floats(padding.size(), 0.0f)) << head;
    for (const float value : bench.sink.gradient(head)) ASSERT_TRUE(std::isfinite(value));
  }
}

TEST_P(Gpt2Precision, EvaluationIsTheTrainingLoss) {
  Gpt2Bench bench(odd_options(GetParam()));
  bench.randomize(3);
  const BenchBatch batch = odd_batch();
  const float loss = bench.gradients(batch);
  EXPECT_EQ(bench.evaluate(batch), loss);
  BenchOptions forward_only = odd_options(GetParam());
  forward_only.training = false;
  Gpt2Bench other(forward_only);
  other.randomize(3);
  EXPECT_EQ(other.evaluate(batch), loss);
}

TEST(Gpt2, Bf16GradientsAreCloseToThoseOfFp32) {
  Gpt2Bench single(odd_options()), half(odd_options(DType::kBF16));
  single.randomize(4);
  half.randomize(4);
  const BenchBatch batch = odd_batch();
  const float loss = single.gradients(batch);
  EXPECT_NEAR(half.gradients(batch), loss, 1e-2 * loss);
  for (const Parameter& p : single.store.parameters()) {
    Floats a = half.sink.gradient(p.name), b = single.sink.gradient(p.name);
    if (p.name.find("c_attn.bias") != std::string::npos) {
      // The keys' bias has no gradient but rounding: compare queries and values.
      for (Floats* g : {&a, &b}) g->erase(g->begin() + 60, g->begin() + 120);
    }
    EXPECT_LE(distance(a, b), 2e-2) << p.name;
  }
}

TEST(Gpt2, LossScaleScalesTheGradients) {
  Gpt2Bench bench(odd_options());
  bench.randomize(5);
  const BenchBatch batch = odd_batch();
  const float loss = bench.gradients(batch);
  const Floats gradient = bench.sink.gradient("h.1.mlp.c_fc.weight");
  EXPECT_EQ(bench.gradients(batch, 0.25f), 0.25f * loss);
  Floats scaled = bench.sink.gradient("h.1.mlp.c_fc.weight");
  for (float& value : scaled) value *= 4;
  EXPECT_LE(distance(scaled, gradient), 1e-6);
}

TEST(Gpt2, UntiedHeadHasItsOwnGradient) {
  BenchOptions options = odd_options();
  options.head_chunk = 20;
  Gpt2Bench tied(options);
  tied.randomize(6);
  options.config.tied_head = false;
  Gpt2Bench untied(options);
  for (const Parameter& p : tied.store.parameters()) untied.set_weight(p.name, tied.weight(p.name));
  untied.set_weight("lm_head.weight", tied.weight("wte.weight"));
  const BenchBatch batch = odd_batch();
  EXPECT_EQ(untied.gradients(batch), tied.gradients(batch));
  // With equal weights the tied gradient is the sum of the two.
  const Floats head = untied.sink.gradient("lm_head.weight"), lookup = untied.sink.gradient("wte.weight");
  Floats sum(head.size());
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = head[i] + lookup[i];
  EXPECT_LE(distance(sum, tied.sink.gradient("wte.weight")), 1e-6);
  EXPECT_GT(distance(head, tied.sink.gradient("wte.weight")), 1e-2);
  EXPECT_EQ(untied.sink.gradient("h.0.ln_1.weight"), tied.sink.gradient("h.0.ln_1.weight"));
  // A token that is not among the inputs gets no gradient from the lookup.
  const auto& inputs = batch.tokens.inputs;
  const auto channels = static_cast<size_t>(options.config.channels);
  for (int32_t token = 0; token < 131; ++token) {
    if (std::find(inputs.begin(), inputs.end(), token) != inputs.end()) continue;
    for (size_t c = 0; c < channels; ++c) ASSERT_EQ(lookup[static_cast<size_t>(token) * channels + c], 0.0f) << token;
  }
}

TEST(Gpt2, SmallerBatchesThanPlanned) {
  BenchOptions options = odd_options();
  Gpt2Bench large(options);
  large.randomize(8);
  const BenchBatch batch = BenchBatch::random(2, 11, 131, 9);
  options.batch = 2, options.sequence = 11, options.head_chunk = 22;
  Gpt2Bench exact(options);
  exact.randomize(8);
  EXPECT_NEAR(large.gradients(batch), exact.gradients(batch), 1e-6);
  for (const char* name : {"wte.weight", "wpe.weight", "h.2.attn.c_attn.weight", "ln_f.bias"}) {
    EXPECT_LE(distance(large.sink.gradient(name), exact.sink.gradient(name)), 1e-6) << name;
  }
  EXPECT_THROW(large.evaluate(BenchBatch::random(4, 17, 131, 9)), std::logic_error);
}

TEST(Gpt2, TargetsOfMinusOneDoNotCount) {
  Gpt2Bench bench(odd_options());
  bench.randomize(10);
  BenchBatch batch = odd_batch();
  const float all = bench.evaluate(batch);
  std::fill(batch.tokens.targets.begin() + 17, batch.tokens.targets.end(), -1);
  const float first = bench.evaluate(batch);
  EXPECT_GT(first, 0.2f * all);
  EXPECT_LT(first, 0.5f * all);
}

TEST(Gpt2, ANonFiniteLossClosesTheGate) {
  Gpt2Bench bench(odd_options());
  bench.randomize(11);
  const auto gate = [&] {
    StepScalars scalars;
    bench.backend->copy(&scalars, bench.scalars, sizeof scalars);
    bench.backend->synchronize();
    return scalars.gate;
  };
  bench.gradients(odd_batch());
  EXPECT_EQ(gate(), 1u);
  Floats bias = bench.weight("h.1.mlp.c_fc.bias");
  bias[5] = NAN;
  bench.set_weight("h.1.mlp.c_fc.bias", bias);
  EXPECT_TRUE(std::isnan(bench.gradients(odd_batch())));
  EXPECT_EQ(gate(), 0u);
}

TEST(Gpt2, InitialWeightsHaveTheirMoments) {
  Gpt2Config config;
  config.vocabulary = 300, config.positions = 64, config.layers = 8, config.heads = 2, config.channels = 128;
  Gpt2Bench bench({.config = config, .batch = 1, .sequence = 4, .head_chunk = 4});
  bench.model.initialize(5);
  const auto stddev = [&](const std::string& name) {
    double squares = 0;
    const Floats values = bench.weight(name);
    for (const float value : values) squares += static_cast<double>(value) * value;
    return std::sqrt(squares / static_cast<double>(values.size()));
  };
  for (const char* name : {"wte.weight", "wpe.weight", "h.3.attn.c_attn.weight", "h.7.mlp.c_fc.weight"}) {
    EXPECT_NEAR(stddev(name), 0.02, 0.001) << name;
  }
  for (const char* name : {"h.0.attn.c_proj.weight", "h.7.mlp.c_proj.weight"}) {
    EXPECT_NEAR(stddev(name), 0.02 / 4, 0.0003) << name;
  }
  EXPECT_EQ(bench.weight("h.0.attn.c_attn.bias"), Floats(384, 0.0f));
  EXPECT_EQ(bench.weight("h.0.ln_2.weight"), Floats(128, 1.0f));
  EXPECT_EQ(bench.weight("ln_f.bias"), Floats(128, 0.0f));
  const Floats first = bench.weight("h.0.mlp.c_fc.weight");
  EXPECT_NE(first, bench.weight("h.1.mlp.c_fc.weight"));
  bench.model.initialize(6);
  EXPECT_NE(first, bench.weight("h.0.mlp.c_fc.weight"));
  bench.model.initialize(5);
  EXPECT_EQ(first, bench.weight("h.0.mlp.c_fc.weight"));
}

}  // namespace
