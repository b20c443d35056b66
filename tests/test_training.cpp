// test_training.cpp: steps of a small GPT-2 through the engine, as the trainer runs it. On every backend: what
// must not change a bit (recompute levels, fused against dense, graphs replayed or not, another run) does not. On CUDA:
// the losses are the CPU backend's.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/training_run.h"

namespace {

float learning_rate_of(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kSgd: return 0.05f;
    case OptimizerKind::kAdamW: return 1e-3f;
    default: return 2e-3f;
  }
}

struct Case {
  OptimizerKind optimizer;
  GradientMode mode;
  DType dtype;
};

std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  const char* const optimizers[] = {"Flora", "AdamW", "Adafactor", "Sgd"};
  const char* const modes[] = {"Dense", "Fused", "Compressed"};
  return std::string(optimizers[static_cast<int>(info.param.optimizer)]) + modes[static_cast<int>(info.param.mode)] +
         "_" + dtype_name(info.param.dtype);
}

EngineConfig config_of(const Case& c) {
  EngineConfig config = small_config(c.dtype);
  config.optimizer.kind = c.optimizer;
  config.gradients.kind = c.mode;
  if (c.mode == GradientMode::kCompressed) {
    config.gradients.accumulation_rank = 16;
    config.gradients.micro_batches = 2;
  }
  return config;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const OptimizerKind optimizer :
         {OptimizerKind::kFlora, OptimizerKind::kAdamW, OptimizerKind::kAdafactor, OptimizerKind::kSgd})
      for (const GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed})
        cases.push_back({optimizer, mode, dtype});
  return cases;
}

class Training : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(All, Training, ::testing::ValuesIn(all_cases()), case_name);

// In bf16 a weight's rounding is random and its numbers are the same on both, but a sum that differs in its last bit
// now and then rounds a weight the other way.
TEST_P(Training, LearnsInThePlannedMemoryWithTheLossesOfTheCpu) {
  const EngineConfig config = config_of(GetParam());
  const float lr = learning_rate_of(GetParam().optimizer);
  const uint32_t steps = takes_long() ? 6 : kSteps;  // at least one change of projection
  const Outcome outcome = train(test_backend_name(), config, lr, steps);
  EXPECT_EQ(outcome.allocated, outcome.planned);
  EXPECT_NEAR(outcome.losses.front(), std::log(static_cast<float>(kVocabulary)), 0.2f);
  if (steps == kSteps) {
    EXPECT_LT(outcome.losses.back(), outcome.losses.front() - 0.02f);
  }
  if (test_backend_name() == "cpu") return;
  const Outcome cpu = train("cpu", config, lr, steps);
  const double tolerance = GetParam().dtype == DType::kF32 ? 1e-4 : 1e-2;
  for (uint32_t t = 0; t < steps; ++t) {
    EXPECT_NEAR(outcome.losses[t], cpu.losses[t], tolerance * cpu.losses[t]) << "step " << t + 1;
    EXPECT_NEAR(outcome.norms[t], cpu.norms[t], 10 * tolerance * cpu.norms[t]) << "step " << t + 1;
  }
}

// Long enough for a change of projection, and for the graphs of the steps around it to be replayed.
constexpr uint32_t kFewSteps = 9;

class TrainingDtype : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, TrainingDtype, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(TrainingDtype, RecomputeLevelsChangeNoBit) {
  EngineConfig config = config_of({OptimizerKind::kFlora, GradientMode::kFused, GetParam()});
  const Outcome none = train(test_backend_name(), config, 2e-3f, kFewSteps);
  for (const Recompute level : {Recompute::kGelu, Recompute::kNormsGelu, Recompute::kAttention, Recompute::kBlock}) {
    config.shapes.recompute = level;
    const Outcome other = train(test_backend_name(), config, 2e-3f, kFewSteps);
    EXPECT_EQ(other.losses, none.losses) << static_cast<int>(level);
    EXPECT_TRUE(other.bits == none.bits) << static_cast<int>(level);
  }
}

TEST_P(TrainingDtype, FusedIsDense) {
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW, OptimizerKind::kSgd}) {
    const float lr = learning_rate_of(optimizer);
    const auto run = [&](GradientMode mode) {
      return train(test_backend_name(), config_of({optimizer, mode, GetParam()}), lr, kFewSteps);
    };
    const Outcome dense = run(GradientMode::kDense), fused = run(GradientMode::kFused);
    EXPECT_EQ(fused.losses, dense.losses) << static_cast<int>(optimizer);
    EXPECT_TRUE(fused.bits == dense.bits) << static_cast<int>(optimizer);
  }
}

TEST_P(TrainingDtype, GraphsChangeNoBit) {
  for (const GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
    EngineConfig config = config_of({OptimizerKind::kFlora, mode, GetParam()});
    const Outcome replayed = train(test_backend_name(), config, 2e-3f, kFewSteps);
    config.graphs = false;
    const Outcome issued = train(test_backend_name(), config, 2e-3f, kFewSteps);
    EXPECT_EQ(replayed.losses, issued.losses);
    EXPECT_EQ(replayed.norms, issued.norms);
    EXPECT_TRUE(replayed.bits == issued.bits);
  }
}

// Several micro-batches summed in bf16 with stochastic rounding, clipping by a second pass, 8-bit states, master
// weights, restored norms: what the other tests leave out, in one configuration each.
TEST_P(TrainingDtype, RarerSettingsRepeatWithAndWithoutGraphs) {
  std::vector<EngineConfig> configs;
  EngineConfig summed = config_of({OptimizerKind::kFlora, GradientMode::kFused, GetParam()});
  summed.gradients.micro_batches = 3;
  summed.gradients.accumulation_dtype = DType::kBF16;
  configs.push_back(summed);
  EngineConfig clipped = config_of({OptimizerKind::kAdamW, GradientMode::kFused, GetParam()});
  clipped.gradients.clip_norm = 0.5f;
  clipped.gradients.micro_batches = 2;
  clipped.optimizer.state_dtype = DType::kI8;
  configs.push_back(clipped);
  EngineConfig rescaled = config_of({OptimizerKind::kFlora, GradientMode::kFused, GetParam()});
  rescaled.optimizer.projection = rescaled.gradients.projection = ProjectionKind::kGaussian;
  rescaled.optimizer.transfer = TransferKind::kRescale;
  rescaled.gradients.micro_batches = 2;
  rescaled.gradients.accumulation_rank = 16;
  rescaled.master_weights = GetParam() == DType::kBF16;
  configs.push_back(rescaled);
  EngineConfig residual = config_of({OptimizerKind::kFlora, GradientMode::kFused, GetParam()});
  residual.optimizer.residual = true;
  residual.optimizer.half_life = 4000, residual.optimizer.tokens_per_step = 100;
  configs.push_back(residual);
  for (EngineConfig config : configs) {
    const Outcome first = train(test_backend_name(), config, 2e-3f, kFewSteps);
    EXPECT_LT(first.losses.back(), first.losses.front());
    config.graphs = false;
    const Outcome second = train(test_backend_name(), config, 2e-3f, kFewSteps);
    EXPECT_EQ(second.losses, first.losses);
    EXPECT_TRUE(second.bits == first.bits);
  }
}

}  // namespace
