// test_spread.cpp: weights and optimizer states that ranks keep together, each its part: not a bit of a training run
// changes, on any rank; what a rank takes is planned; and what travels is what the formulas say.
#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "parallel/part.h"
#include "tests/thread_ranks.h"
#include "tests/training_run.h"

namespace {

constexpr uint32_t kFewSteps = 3;

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

// The run of `config`, by default on two and on three ranks, each against what it is with everything on every rank.
void expect_same_bits(EngineConfig config, const std::string& what, const std::vector<int>& counts = {2, 3}) {
  for (const int count : counts) {
    if (takes_long() && count != counts[0]) continue;
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
      if (GetParam() == DType::kF32 && optimizer != OptimizerKind::kFlora) continue;  // the same moves as in bf16
      const bool moves = optimizer == OptimizerKind::kFlora || optimizer == OptimizerKind::kAdamW;
      if (takes_long() && (!moves || GetParam() == DType::kF32 || mode == GradientMode::kCompressed)) continue;
      EngineConfig config = deep_config(3, GetParam(), optimizer, mode);
      if (optimizer == OptimizerKind::kSgd) config.optimizer.beta1 = mode == GradientMode::kFused ? 0.9f : 0.0f;
      expect_same_bits(config, name_of_case(optimizer, mode), {mode == GradientMode::kDense ? 2 : 3});
    }
  }
}

// Several micro-batches, two passes for clipping, 8-bit states, other recompute levels, activations in host memory.
TEST_P(SpreadDtype, ChangesNoBitOfRarerSettings) {
  if (takes_long() && GetParam() == DType::kF32) return;
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW}) {
    EngineConfig config = deep_config(3, GetParam(), optimizer);
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
      if (takes_long() && mode == GradientMode::kDense) continue;
      EngineConfig config = deep_config(3, DType::kBF16, optimizer, mode);
      config.master_weights = true;
      config.optimizer.scale_parameter = optimizer == OptimizerKind::kFlora;
      expect_same_bits(config, "master copies, " + name_of_case(optimizer, mode), {2});
    }
  }
}

TEST(SpreadWeights, ChangeNoBitAs8BitCodes) {
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW}) {
    EngineConfig config = deep_config(3, DType::kBF16, optimizer);
    config.weight_dtype = DType::kI8;
    expect_same_bits(config, "8-bit weights, " + name_of_case(optimizer, GradientMode::kFused));
  }
}

TEST(SpreadWeights, ChangeNoBitWithGradientsInBlocks) {
  for (const OptimizerKind optimizer : {OptimizerKind::kFlora, OptimizerKind::kAdamW}) {
    EngineConfig config = deep_config(3, DType::kF32, optimizer);
    config.gradients.blocks = GradientBlocks::kAll;
    expect_same_bits(config, "blocks, " + name_of_case(optimizer, GradientMode::kFused));
  }
}

// A layer's four matrices, or what Flora keeps of them, from every other rank: so many elements, padding included.
int64_t gathered(const std::vector<int64_t>& matrices, int ranks) {
  int64_t elements = 0;
  for (const int64_t matrix : matrices) elements += (ranks - 1) * part_elements(matrix, ranks);
  return elements;
}

int64_t bytes_of_two_steps(const EngineConfig& config, int count) {
  int64_t bytes[2];
  for (const bool more : {false, true}) {
    ThreadRanks ranks(count);
    ranks.run([&](int rank) {
      const std::unique_ptr<Backend> backend = make_test_backend();
      const std::unique_ptr<Communicator> communicator = ranks.communicator(rank, *backend);
      const Outcome outcome = train(*backend, *communicator, config, 2e-3f, more ? 4 : 2);
      if (rank == 0) bytes[more] = outcome.bytes_sent;
    });
  }
  return bytes[1] - bytes[0];
}

// Beside the sums of gradients. AdamW's updates leave every layer old, so that the forward pass gathers all of them and
// the backward pass those that are not in the two slots any more, and an update nothing; Flora's leave what is in the
// slots as it should be, but need the momentum whole.
TEST(SpreadWeights, SendWhatTheFormulaSays) {
  if (takes_long()) return;  // says the same
  constexpr int64_t kLayers = 5, C = 64, r = 8, kSlots = 2;
  for (const int ranks : {2, 3}) {
    const int64_t weights = 4 * gathered({C * 3 * C, C * C, C * 4 * C, 4 * C * C}, ranks);
    const int64_t momentum = 4 * gathered({r * 3 * C, C * r, r * 4 * C, 4 * C * r}, ranks);
    for (const auto& [optimizer, mode, expected] :
         {std::tuple(OptimizerKind::kAdamW, GradientMode::kDense, (2 * kLayers - kSlots) * weights),
          std::tuple(OptimizerKind::kAdamW, GradientMode::kFused, (2 * kLayers - kSlots) * weights),
          std::tuple(OptimizerKind::kFlora, GradientMode::kFused,
                     2 * (kLayers - kSlots) * weights + kLayers * momentum)}) {
      EngineConfig config = deep_config(3, DType::kF32, optimizer, mode);
      config.model.layers = kLayers;
      const int64_t whole = bytes_of_two_steps(config, ranks);
      config.spread = Spread::kWeights;
      EXPECT_EQ(bytes_of_two_steps(config, ranks) - whole, 2 * expected)
          << name_of_case(optimizer, mode) << " on " << ranks;
    }
  }
}

TEST(SpreadWeights, TakeTheirPartOfTheMemory) {
  const auto planned = [](OptimizerKind optimizer, int ranks, int64_t layers) {
    EngineConfig config = deep_config(3, DType::kF32, optimizer);
    config.model.layers = layers;
    config.spread = Spread::kWeights;
    config.ranks = ranks;
    return Engine(config, *make_test_backend()).plan().device_bytes();
  };
  // What 40 more layers take, in bytes of a layer's matrices: weights, and one state of SGD, two of AdamW.
  const double matrices = 4.0 * 12 * 64 * 64;
  for (const int ranks : {2, 4, 8}) {
    const auto more = [&](OptimizerKind optimizer) {
      return static_cast<double>(planned(optimizer, ranks, 50) - planned(optimizer, ranks, 10)) / 40 / matrices;
    };
    const double vectors = 13.0 / (12 * 64), residual = 33.0 * 2 / (12 * 64);  // whole on every rank
    EXPECT_NEAR(more(OptimizerKind::kSgd), 2.0 / ranks + 2 * vectors + residual, 0.03) << ranks;
    EXPECT_NEAR(more(OptimizerKind::kAdamW), 3.0 / ranks + 3 * vectors + residual, 0.03) << ranks;
  }
}

}  // namespace
