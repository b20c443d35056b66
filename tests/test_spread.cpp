// test_spread.cpp: weights and optimizer states that ranks keep together, each its part: not a bit of a training run
// changes, on any rank; what a rank takes is planned; and what travels is what the formulas say.
#include <gtest/gtest.h>

#include <string>

#include "parallel/part.h"
#include "tests/thread_ranks.h"
#include "tests/training_run.h"

namespace {

constexpr uint32_t kFewSteps = 3;

EngineConfig deep_config(DType dtype, OptimizerKind optimizer = OptimizerKind::kFlora,
                         GradientMode mode = GradientMode::kFused) {
  EngineConfig config = small_config(dtype);
  config.model.layers = 3;
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

// Of each rank.
std::vector<Outcome> run(const EngineConfig& config, int count) {
  std::vector<Outcome> outcomes(static_cast<size_t>(count));
  ThreadRanks ranks(count);
  ranks.run([&](int rank) {
    const std::unique_ptr<Backend> backend = make_test_backend();
    const std::unique_ptr<Communicator> communicator = ranks.communicator(rank, *backend);
    outcomes[static_cast<size_t>(rank)] = train(*backend, *communicator, config, 2e-3f, kFewSteps);
  });
  return outcomes;
}

// The run of `config` on two and on three ranks, each against what it is with everything on every rank.
void expect_same_bits(EngineConfig config, const std::string& what) {
  for (const int count : {2, 3}) {
    config.spread = Spread::kNone;
    const std::vector<Outcome> whole = run(config, count);
    config.spread = Spread::kWeights;
    const std::vector<Outcome> spread = run(config, count);
    for (size_t rank = 0; rank < spread.size(); ++rank) {
      const std::string where = what + ", rank " + std::to_string(rank) + " of " + std::to_string(count);
      EXPECT_EQ(spread[rank].losses, whole[0].losses) << where;
      EXPECT_EQ(spread[rank].norms, whole[0].norms) << where;
      EXPECT_TRUE(spread[rank].bits == whole[0].bits) << where;
      EXPECT_EQ(spread[rank].allocated, spread[rank].planned) << where;
      EXPECT_EQ(spread[rank].planned, spread[0].planned) << where;
    }
  }
}

std::string name_of_case(OptimizerKind optimizer, GradientMode mode) {
  return std::string(kOptimizerNames[static_cast<size_t>(optimizer)].second) + ", " +
         kGradientModeNames[static_cast<size_t>(mode)].second;
}

class SpreadDtype : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, SpreadDtype, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(SpreadDtype, ChangesNoBitOfAnyOptimizerAndMode) {
  for (const OptimizerKind optimizer :
       {OptimizerKind::kFlora, OptimizerKind::kAdamW, OptimizerKind::kAdafactor, OptimizerKind::kSgd}) {
    for (const GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
      EngineConfig config = deep_config(GetParam(), optimizer, mode);
      if (optimizer == OptimizerKind::kSgd) config.optimizer.beta1 = mode == GradientMode::kFused ? 0.9f : 0.0f;
      expect_same_bits(config, name_of_case(optimizer, mode));
    }
  }
}

// Several micro-batches, two passes for clipping, 8-bit states, other recompute levels, activations in host memory.
TEST_P(SpreadDtype, ChangesNoBitOfRarerSettings) {
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW}) {
    EngineConfig config = deep_config(GetParam(), optimizer);
    config.model.tied_head = false;
    config.shapes.recompute = Recompute::kAttention;
    config.gradients.micro_batches = 2;
    config.gradients.clip_norm = 0.5f;
    config.optimizer.state_dtype = DType::kI8;
    config.offload = {.activations = true, .layers_in_flight = 3};
    expect_same_bits(config, "8-bit states");
  }
}

TEST(SpreadWeights, ChangeNoBitWithMasterCopies) {
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW}) {
    for (const GradientMode mode : {GradientMode::kDense, GradientMode::kFused}) {
      EngineConfig config = deep_config(DType::kBF16, optimizer, mode);
      config.master_weights = true;
      config.optimizer.scale_parameter = optimizer == OptimizerKind::kFlora;
      expect_same_bits(config, "master copies, " + name_of_case(optimizer, mode));
    }
  }
}

TEST(SpreadWeights, ChangeNoBitAs8BitCodes) {
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW}) {
    EngineConfig config = deep_config(DType::kBF16, optimizer);
    config.weight_dtype = DType::kI8;
    expect_same_bits(config, "8-bit weights, " + name_of_case(optimizer, GradientMode::kFused));
  }
}

TEST(SpreadWeights, ChangeNoBitWithGradientsInBlocks) {
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW}) {
    EngineConfig config = deep_config(DType::kF32, optimizer);
    config.gradients.blocks = GradientBlocks::kAll;
    expect_same_bits(config, "blocks, " + name_of_case(optimizer, GradientMode::kFused));
  }
}

}  // namespace
