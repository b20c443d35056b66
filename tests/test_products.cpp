// test_products.cpp: which matrix products of a training step a GPU computes without tensor cores: none, whatever the
// options, as long as the shapes are multiples of 8 as the models' are.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/training_run.h"
#include "train/cost_model.h"
#include "train/planner.h"

namespace {

class GpuProducts : public ::testing::TestWithParam<std::string> {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GpuProducts);
INSTANTIATE_TEST_SUITE_P(All, GpuProducts, ::testing::ValuesIn(gpu_backend_names()));

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16, kI8 = DType::kI8;

// One block, every change of projection in the first step.
EngineConfig one_layer() {
  EngineConfig config = small_config(kBF16);
  config.model.layers = 1;
  config.optimizer.kappa = 1;
  return config;
}

// What took the plain kernel in one step.
std::string slow_products(const std::string& backend_name, const EngineConfig& config) {
  const std::unique_ptr<Backend> backend = make_test_backend(backend_name);
  train(*backend, alone(), config, 1e-3f, 1);
  return backend->slow_products();
}

struct Mode {
  const char* name;
  OptimizerKind optimizer;
  GradientMode gradients;
  int micro_batches = 1;
  int64_t accumulation_rank = 0;
  DType accumulation = kF32;
  bool compress_embeddings = false;
  int64_t rank = 8;
  GradientBlocks blocks = GradientBlocks::kWhole;
  bool residual = true;
};

const Mode kModes[] = {
    {"AdamW", OptimizerKind::kAdamW, GradientMode::kDense},
    {"AdamW, two micro-batches", OptimizerKind::kAdamW, GradientMode::kDense, 2, 0, kBF16},
    {"Flora", OptimizerKind::kFlora, GradientMode::kFused},
    {"Flora, two micro-batches", OptimizerKind::kFlora, GradientMode::kFused, 2},
    {"Flora, two micro-batches in bf16", OptimizerKind::kFlora, GradientMode::kFused, 2, 0, kBF16},
    {"Flora, projected sums", OptimizerKind::kFlora, GradientMode::kFused, 2, 16},
    {"Flora, compressed", OptimizerKind::kFlora, GradientMode::kCompressed, 2, 16},
    {"Flora, compressed in bf16", OptimizerKind::kFlora, GradientMode::kCompressed, 2, 16, kBF16},
    {"Flora, compressed embeddings", OptimizerKind::kFlora, GradientMode::kCompressed, 2, 16, kF32, true},
    {"Flora of rank 5", OptimizerKind::kFlora, GradientMode::kCompressed, 2, 3, kF32, true, 5},
    {"Flora in blocks", OptimizerKind::kFlora, GradientMode::kFused, 1, 0, kF32, false, 8, GradientBlocks::kAll},
    {"Flora as published", OptimizerKind::kFlora, GradientMode::kFused, 1, 0, kF32, false, 8, GradientBlocks::kWhole,
     false},
};

// Weights are in products with activations only, states in products with gradients only.
TEST_P(GpuProducts, OfEveryMixOfDTypes) {
  for (const Mode& mode : kModes) {
    const bool of_the_model = mode.rank == kModes[0].rank && mode.micro_batches == 1;
    for (const DType weight : of_the_model ? std::vector{kBF16, kF32, kI8} : std::vector{kBF16}) {
      for (const DType activation : of_the_model ? std::vector{kBF16, kF32} : std::vector{kBF16}) {
        for (const DType gradient : {kBF16, kF32}) {
          for (const DType state : weight == kBF16 ? std::vector{kBF16, kF32, kI8} : std::vector{kBF16}) {
            EngineConfig config = one_layer();
            config.weight_dtype = weight;
            config.shapes.dtype = activation;
            config.optimizer.kind = mode.optimizer;
            config.optimizer.rank = mode.rank;
            config.optimizer.residual = mode.residual && mode.optimizer == OptimizerKind::kFlora;
            config.optimizer.state_dtype = state;
            config.optimizer.compress_embeddings = config.gradients.compress_embeddings = mode.compress_embeddings;
            config.gradients.gradient_dtype = gradient;
            config.gradients.kind = mode.gradients;
            config.gradients.micro_batches = mode.micro_batches;
            config.gradients.accumulation_rank = mode.accumulation_rank;
            config.gradients.accumulation_dtype = mode.accumulation;
            config.gradients.blocks = mode.blocks;
            EXPECT_EQ(slow_products(GetParam(), config), "")
                << mode.name << ", weights " << dtype_name(weight) << ", activations " << dtype_name(activation)
                << ", gradients " << dtype_name(gradient) << ", state " << dtype_name(state);
          }
        }
      }
    }
  }
}

// Every row of the table that --memory-budget chooses from.
TEST_P(GpuProducts, OfEverySettingOfThePlanner) {
  const std::unique_ptr<Backend> backend = make_test_backend(GetParam());
  SearchSpace space = {.micro_batch = true,
                       .recompute = true,
                       .head_chunk = true,
                       .gradient_blocks = true,
                       .offload = true,
                       .sequences_per_step = kBatch};
  EngineConfig start = one_layer();
  start.gradients.accumulation_rank = 16;
  const std::vector<Candidate> all = candidates(start, space, nominal_rates(start, "cuda"), *backend);
  ASSERT_GT(all.size(), 50u);
  for (const Candidate& candidate : all) {
    if (candidate.config.shapes.batch != kBatch) continue;  // what train() draws
    EXPECT_EQ(slow_products(GetParam(), candidate.config), "") << settings_flags(candidate.config);
  }
}

// Where activations are bf16, fp32 gradients meet bf16 projections: two fp32 operands keep tensor cores idle.
TEST(Products, ProjectionsAreInTheDTypeOfTheProducts) {
  EngineConfig config = one_layer();
  config.gradients.kind = GradientMode::kCompressed;
  config.gradients.accumulation_rank = config.optimizer.rank;
  config.gradients.gradient_dtype = kF32;
  const std::unique_ptr<Backend> backend = make_test_backend();
  const auto bytes = [&](DType activation) {
    config.shapes.dtype = activation;
    const MemoryPlan plan = Engine(config, *backend).declared();
    return std::pair(plan.find("flora.projection")->bytes, plan.find("gradient.projection")->bytes);
  };
  const size_t elements = static_cast<size_t>(config.optimizer.rank * config.model.channels);
  EXPECT_EQ(bytes(kBF16), std::pair(2 * elements, 2 * elements));
  EXPECT_EQ(bytes(kF32), std::pair(4 * elements, 4 * elements));
}

}  // namespace
