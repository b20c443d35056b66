// test_overlap.cpp: updates that run beside the backward pass, on backends that have a stream for them, change no bit
// of losses, norms, weights and states, whether a step is issued or replayed, and cost what is planned.
#include <gtest/gtest.h>

#include <string>

#include "tests/backends.h"
#include "tests/training_run.h"

namespace {

class Overlap : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Overlap, ::testing::ValuesIn(backend_names()));

void expect_same(const std::string& backend, EngineConfig config, const char* what, uint32_t steps = 5) {
  config.overlap_updates = false;
  const Outcome alone = train(backend, config, 0.01f, steps);
  config.overlap_updates = true;
  for (bool graphs : {false, true}) {
    config.graphs = graphs;
    const Outcome beside = train(backend, config, 0.01f, steps);
    EXPECT_EQ(beside.losses, alone.losses) << what << graphs;
    EXPECT_EQ(beside.norms, alone.norms) << what << graphs;
    EXPECT_TRUE(beside.bits == alone.bits) << what << graphs;
    EXPECT_EQ(beside.planned, beside.allocated) << what;
  }
}

TEST_P(Overlap, ChangesNoBit) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (OptimizerKind kind :
         {OptimizerKind::kFlora, OptimizerKind::kAdafactor, OptimizerKind::kAdamW, OptimizerKind::kSgd}) {
      if (takes_long() && dtype == DType::kF32 && kind != OptimizerKind::kFlora) continue;  // the same moves
      expect_same(GetParam(), deep_config(3, dtype, kind), "optimizer");
    }
  }
}

TEST_P(Overlap, ChangesNoBitOfSums) {
  EngineConfig config = deep_config(3, DType::kBF16);
  config.gradients.micro_batches = 3;
  expect_same(GetParam(), config, "sums");
  config.gradients.accumulation_dtype = DType::kBF16;
  expect_same(GetParam(), config, "rounded sums");
  config.gradients.accumulation_rank = 16;
  expect_same(GetParam(), config, "projected sums");
}

TEST_P(Overlap, ChangesNoBitOfOtherSettings) {
  EngineConfig clipped = deep_config(3, DType::kF32, OptimizerKind::kSgd);
  clipped.gradients.clip_norm = 0.5f;
  expect_same(GetParam(), clipped, "clipped");
  EngineConfig codes = deep_config(3, DType::kBF16);
  codes.weight_dtype = DType::kI8;
  codes.optimizer.state_dtype = DType::kI8;
  codes.optimizer.weight_piece = 64 * 64;
  expect_same(GetParam(), codes, "8 bits");
  EngineConfig residual = deep_config(3, DType::kBF16);
  residual.optimizer.residual = true;
  residual.optimizer.scale_parameter = true;
  residual.master_weights = true;
  expect_same(GetParam(), residual, "residual");
  EngineConfig streamed = deep_config(4, DType::kBF16);
  streamed.offload.activations = true;
  expect_same(GetParam(), streamed, "streamed activations");
  EngineConfig untied = deep_config(3, DType::kF32);
  untied.model.tied_head = false;
  expect_same(GetParam(), untied, "untied head");
}

// Where it would not be of use, nothing is taken for it.
TEST_P(Overlap, CostsWhatIsPlanned) {
  const std::unique_ptr<Backend> backend = make_test_backend(GetParam());
  const auto bytes = [&](EngineConfig config, bool overlap) {
    config.overlap_updates = overlap;
    return Engine(config, *backend).plan().device_bytes();
  };
  const EngineConfig fused = deep_config(3, DType::kBF16);
  EngineConfig dense = fused, blocks = fused, streamed = fused;
  dense.gradients.kind = GradientMode::kDense;
  blocks.gradients.blocks = GradientBlocks::kAll;
  streamed.offload.weights = true;
  for (const EngineConfig& config : {dense, blocks, streamed}) EXPECT_EQ(bytes(config, true), bytes(config, false));
  EngineConfig overlapped = fused;
  overlapped.overlap_updates = true;
  const MemoryPlan plan = Engine(overlapped, *backend).plan();
  if (!backend->has_update_stream()) {
    EXPECT_EQ(plan.device_bytes(), bytes(fused, false));
    return;
  }
  const int64_t channels = fused.model.channels;
  EXPECT_EQ(plan.find("gradient.second_matrix")->bytes, static_cast<size_t>(4 * channels * channels * 2));
  EXPECT_EQ(plan.find("backend.update_workspace")->bytes, plan.find("backend.workspace")->bytes);
}

}  // namespace
