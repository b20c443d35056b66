// test_ranks.cpp: several ranks train as one process with as many times the micro-batches does, have the same bits as
// each other, and send what they should.
#include <gtest/gtest.h>

#include <vector>

#include "tests/thread_ranks.h"
#include "tests/training_run.h"
#include "train/option_values.h"

namespace {

uint32_t many_steps() { return takes_long() ? 5 : 20; }

struct Way {
  std::string name;
  std::function<void(EngineConfig&)> change;
};

// Optimizers x what becomes of gradients.
std::vector<Way> ways() {
  const auto kinds = std::vector<std::pair<std::string, OptimizerKind>>{{"flora", OptimizerKind::kFlora},
                                                                        {"adamw", OptimizerKind::kAdamW},
                                                                        {"adafactor", OptimizerKind::kAdafactor},
                                                                        {"sgd", OptimizerKind::kSgd}};
  std::vector<Way> all;
  for (const auto& [name, kind] : kinds) {
    for (GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
      all.push_back({name + " " + name_of(kGradientModeNames, mode), [kind = kind, mode](EngineConfig& c) {
                       c.optimizer.kind = kind;
                       if (kind != OptimizerKind::kFlora) c.optimizer.rank = 0;
                       c.gradients.kind = mode;
                       if (mode == GradientMode::kCompressed) c.gradients.accumulation_rank = 8;
                     }});
    }
  }
  all.push_back({"dense, clipped", [](EngineConfig& c) {
                   c.gradients.kind = GradientMode::kDense;
                   c.gradients.clip_norm = 0.5f;
                 }});
  all.push_back({"fused, clipped", [](EngineConfig& c) { c.gradients.clip_norm = 0.5f; }});
  all.push_back({"fused, offloaded", [](EngineConfig& c) { c.offload.weights = true; }});
  return all;
}

float rate(const EngineConfig& config) { return config.optimizer.kind == OptimizerKind::kSgd ? 0.1f : 2e-3f; }

std::vector<Outcome> train_on_ranks(const std::string& backend, const EngineConfig& config, int ranks, uint32_t steps) {
  std::vector<Outcome> outcomes(static_cast<size_t>(ranks));
  ThreadRanks threads(ranks);
  threads.run([&](int rank) {
    const std::unique_ptr<Backend> device = make_test_backend(backend, 1);  // ranks are threads already
    const std::unique_ptr<Communicator> communicator = threads.communicator(rank, *device);
    outcomes[static_cast<size_t>(rank)] = train(*device, *communicator, config, rate(config), steps);
  });
  return outcomes;
}

class Ranks : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Ranks, ::testing::ValuesIn(backend_names()));

TEST_P(Ranks, TrainAsOneDoes) {
  const bool emulated = GetParam() == "cuda";  // takes its time
  for (const Way& way : ways()) {
    if (emulated && !way.name.starts_with("f")) continue;
    for (int ranks : {2, 3}) {
      const std::string what = way.name + ", " + std::to_string(ranks) + " ranks";
      EngineConfig config = small_config(DType::kF32);
      way.change(config);
      const uint32_t steps = emulated ? 2 : many_steps();
      const int micro_batches = ranks - 1;
      config.gradients.micro_batches = ranks * micro_batches;
      const std::unique_ptr<Backend> backend = make_test_backend(GetParam());
      const Outcome one = train(*backend, alone(), config, rate(config), steps);
      config.gradients.micro_batches = micro_batches;
      const std::vector<Outcome> all = train_on_ranks(GetParam(), config, ranks, steps);
      for (size_t t = 0; t < steps; ++t) {
        EXPECT_NEAR(all[0].losses[t], one.losses[t], 1e-5f * one.losses[t]) << what << ", step " << t + 1;
        EXPECT_NEAR(all[0].norms[t], one.norms[t], 1e-4f * one.norms[t]) << what << ", step " << t + 1;
      }
      for (const Outcome& rank : all) {
        EXPECT_EQ(rank.losses, all[0].losses) << what;
        EXPECT_EQ(rank.norms, all[0].norms) << what;
        EXPECT_TRUE(rank.bits == all[0].bits) << what << ": ranks have other bits";
        EXPECT_EQ(rank.planned, rank.allocated) << what;
      }
    }
  }
}

// Blocks take turns with the other matrices' buffer. One process can have only one micro-batch in blocks.
TEST_P(Ranks, TrainAsOneDoesWithGradientsInBlocks) {
  EngineConfig config = small_config(DType::kF32);
  config.model.layers = 3;
  const uint32_t steps = GetParam() == "cuda" ? 2 : many_steps();
  config.gradients.micro_batches = 2;
  const std::unique_ptr<Backend> backend = make_test_backend(GetParam());
  const Outcome one = train(*backend, alone(), config, rate(config), steps);
  config.gradients.micro_batches = 1;
  config.gradients.blocks = GradientBlocks::kAll;
  const std::vector<Outcome> both = train_on_ranks(GetParam(), config, 2, steps);
  for (size_t t = 0; t < steps; ++t) {
    EXPECT_NEAR(both[0].losses[t], one.losses[t], 1e-5f * one.losses[t]) << "step " << t + 1;
    EXPECT_NEAR(both[0].norms[t], one.norms[t], 1e-4f * one.norms[t]) << "step " << t + 1;
  }
  EXPECT_TRUE(both[0].bits == both[1].bits);
}

TEST_P(Ranks, HaveTheSameBitsAgain) {
  const bool emulated = GetParam() == "cuda";
  const uint32_t steps = takes_long() ? 2 : 5;
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    std::vector<Way> all = ways();
    // Of one rank all micro-batches but the last are projected, of several all but the last of each: no equality above.
    all.push_back({"fused, projected sums", [](EngineConfig& c) { c.gradients.accumulation_rank = 8; }});
    for (const Way& way : all) {
      if (emulated && !way.name.starts_with("flora f") && !way.name.starts_with("fused, p")) continue;
      EngineConfig config = small_config(dtype);
      way.change(config);
      config.gradients.micro_batches = 2;
      config.gradients.accumulation_dtype = dtype;
      const std::vector<Outcome> first = train_on_ranks(GetParam(), config, 2, steps),
                                 again = train_on_ranks(GetParam(), config, 2, steps);
      EXPECT_EQ(first[0].losses, again[0].losses) << way.name;
      EXPECT_TRUE(first[0].bits == again[0].bits) << way.name;
      EXPECT_TRUE(first[0].bits == first[1].bits) << way.name << ": ranks have other bits";
    }
  }
}

// In float64's place: each step sends 2 (R - 1) / R of the bytes of what is added up, and of the loss.
TEST_P(Ranks, SendWhatTheFormulaSays) {
  for (GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      EngineConfig config = small_config(dtype);
      config.gradients.kind = mode;
      config.gradients.accumulation_rank = mode == GradientMode::kCompressed ? 8 : 0;
      const int64_t C = config.model.channels, L = config.model.layers, V = config.model.vocabulary,
                    T = config.model.positions, r = 8, element = static_cast<int64_t>(dtype_size(dtype));
      int64_t bytes = sizeof(float) + element * (L * 13 * C + 2 * C);  // the loss, the vectors
      if (mode == GradientMode::kCompressed) {
        // down(G) is [r, m] of a wide matrix [n, m], else [n, r]; fp32.
        bytes += 4 * r * (L * (3 * C + C + 4 * C + 4 * C) + V + C);
      } else {
        bytes += element * (L * 12 * C * C + T * C) + 4 * V * C;  // the tied embedding's is fp32
      }
      const std::vector<Outcome> all = train_on_ranks(GetParam(), config, 2, 3);
      EXPECT_EQ(all[0].bytes_sent, 3 * bytes) << name_of(kGradientModeNames, mode) << " " << dtype_name(dtype);
      EXPECT_EQ(all[1].bytes_sent, 3 * bytes);
    }
  }
}

}  // namespace
