// test_offload.cpp: what saves memory and must not change the training. Weights, optimizer states and activations in
// host memory: not a bit. Gradients in blocks of rows: the rounding of sums. 8-bit weights: a little of the loss.
#include <gtest/gtest.h>

#include <string>

#include "tests/training_run.h"

namespace {

constexpr uint32_t kFewSteps = 3;

Outcome run(const EngineConfig& config) {
  const Outcome outcome = train(test_backend_name(), config, 2e-3f, kFewSteps);
  EXPECT_EQ(outcome.allocated, outcome.planned);
  return outcome;
}

void expect_same_bits(const EngineConfig& config, const Outcome& expected, const std::string& what) {
  const Outcome outcome = run(config);
  EXPECT_EQ(outcome.losses, expected.losses) << what;
  EXPECT_EQ(outcome.norms, expected.norms) << what;
  EXPECT_TRUE(outcome.bits == expected.bits) << what;
}

std::string optimizer_name(OptimizerKind kind) {
  const char* const names[] = {"Flora", "AdamW", "Adafactor", "Sgd"};
  return names[static_cast<int>(kind)];
}

class OffloadDtype : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, OffloadDtype, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(OffloadDtype, EveryPartChangesNoBit) {
  EngineConfig config = deep_config(5, GetParam());
  const Outcome resident = run(config);
  for (const Offload offload : {Offload{.activations = true}, Offload{.state = true}, Offload{.weights = true},
                                Offload{.activations = true, .state = true, .weights = true, .layers_in_flight = 3},
                                Offload{.activations = true, .weights = true, .layers_in_flight = 7}}) {
    const bool one_part = offload.activations + offload.state + offload.weights == 1;
    if (takes_long() && GetParam() == DType::kF32 && one_part) continue;  // the same moves as in bf16
    config.offload = offload;
    expect_same_bits(config, resident,
                     std::to_string(offload.activations) + std::to_string(offload.state) +
                         std::to_string(offload.weights) + ", " + std::to_string(offload.layers_in_flight) + " layers");
  }
}

TEST_P(OffloadDtype, EveryOptimizerAndModeChangesNoBit) {
  for (const OptimizerKind optimizer :
       {OptimizerKind::kFlora, OptimizerKind::kAdamW, OptimizerKind::kAdafactor, OptimizerKind::kSgd}) {
    for (const GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
      if (GetParam() == DType::kF32 && optimizer != OptimizerKind::kFlora) continue;  // the same moves as in bf16
      const bool two_states = optimizer == OptimizerKind::kFlora || optimizer == OptimizerKind::kAdamW;
      if (takes_long() && !two_states && mode != GradientMode::kFused) continue;
      EngineConfig config = deep_config(5, GetParam(), optimizer, mode);
      config.model.layers = 3;
      config.master_weights = GetParam() == DType::kBF16 && optimizer == OptimizerKind::kAdamW;
      const Outcome resident = run(config);
      config.offload = {.activations = true, .state = true, .weights = true};
      expect_same_bits(config, resident,
                       std::to_string(static_cast<int>(optimizer)) + ", " + std::to_string(static_cast<int>(mode)));
    }
  }
}

// Several micro-batches, two passes for clipping, 8-bit states, other recompute levels.
TEST_P(OffloadDtype, RarerSettingsChangeNoBit) {
  for (const Recompute level : {Recompute::kNone, Recompute::kAttention}) {
    if (takes_long() && (GetParam() == DType::kF32) != (level == Recompute::kNone)) continue;
    EngineConfig config = deep_config(5, GetParam());
    config.model.layers = 3;
    config.shapes.recompute = level;
    config.model.tied_head = false;
    config.gradients.micro_batches = 2;
    config.gradients.clip_norm = 0.5f;
    config.optimizer.state_dtype = DType::kI8;
    const Outcome resident = run(config);
    config.offload = {.activations = true, .state = true, .weights = true};
    expect_same_bits(config, resident, "recompute level " + std::to_string(static_cast<int>(level)));
  }
}

TEST(Offload, TakesTheDeviceMemoryOfAFewLayersWhateverTheDepth) {
  const auto planned = [](int64_t layers) {
    EngineConfig config = deep_config(5, DType::kBF16);
    config.model.layers = layers;
    config.offload = {.activations = true, .state = true, .weights = true};
    const std::unique_ptr<Backend> backend = make_test_backend();
    return Engine(config, *backend).plan();
  };
  const MemoryPlan shallow = planned(4), deep = planned(40);
  EXPECT_EQ(shallow.device_bytes(), deep.device_bytes());
  EXPECT_GT(deep.host_bytes(), 9 * shallow.host_bytes());
}

struct BlockCase {
  OptimizerKind optimizer;
  DType dtype;
};

class Blocks : public ::testing::TestWithParam<BlockCase> {};
INSTANTIATE_TEST_SUITE_P(
    All, Blocks,
    ::testing::Values(BlockCase{OptimizerKind::kFlora, DType::kF32}, BlockCase{OptimizerKind::kFlora, DType::kBF16},
                      BlockCase{OptimizerKind::kAdamW, DType::kF32}, BlockCase{OptimizerKind::kAdamW, DType::kBF16},
                      BlockCase{OptimizerKind::kAdafactor, DType::kF32}, BlockCase{OptimizerKind::kSgd, DType::kF32}),
    [](const auto& info) { return optimizer_name(info.param.optimizer) + "_" + dtype_name(info.param.dtype); });

TEST_P(Blocks, ChangeTheRoundingOnly) {
  const BlockCase c = GetParam();
  std::vector<EngineConfig> configs;
  for (const bool tied : {true, false}) {
    EngineConfig config = deep_config(5, c.dtype, c.optimizer);
    config.model.layers = 2;
    config.model.tied_head = tied;
    configs.push_back(config);
    if (c.optimizer != OptimizerKind::kFlora && c.optimizer != OptimizerKind::kAdafactor) continue;
    if (takes_long() && c.dtype == DType::kBF16) continue;
    config.optimizer.clip = tied ? 0.0f : 0.3f;
    config.optimizer.scale_parameter = true;
    config.optimizer.compress_embeddings = tied;
    config.optimizer.transfer = TransferKind::kRescale;
    config.optimizer.state_dtype = tied ? c.dtype : DType::kI8;
    configs.push_back(config);
    config.optimizer.projection = ProjectionKind::kCosine;
    config.optimizer.residual = true;
    config.optimizer.rank = tied ? 8 : 24;  // by products; by transforms, where the device has them
    config.optimizer.embedding_momentum = tied;
    configs.push_back(config);
  }
  // fp32: sums in another order. bf16: a rounding of a weight goes the other way now and then.
  const double tolerance = c.dtype == DType::kF32 ? 2e-5 : 1e-2;
  for (EngineConfig config : configs) {
    const Outcome whole = run(config);
    for (const GradientBlocks blocks : {GradientBlocks::kEmbedding, GradientBlocks::kAll}) {
      config.gradients.blocks = blocks;
      const Outcome in_blocks = run(config);
      for (uint32_t t = 0; t < kFewSteps; ++t) {
        EXPECT_NEAR(in_blocks.losses[t], whole.losses[t], tolerance * whole.losses[t]) << "step " << t + 1;
        EXPECT_NEAR(in_blocks.norms[t], whole.norms[t], 20 * tolerance * whole.norms[t]) << "step " << t + 1;
      }
      EXPECT_TRUE(in_blocks.bits != whole.bits) << "blocks were not used";
      if (takes_long() && blocks == GradientBlocks::kEmbedding) continue;
      config.offload = {.activations = true, .state = true, .weights = true};
      expect_same_bits(config, in_blocks, "blocks, streamed");
      config.offload = {};
    }
  }
}

TEST(Blocks, SaveTheGradientOfTheEmbeddingAndMostOfTheWidestMatrix) {
  EngineConfig config = deep_config(5, DType::kBF16);
  config.model.vocabulary = 4000;
  const auto gradients = [&](GradientBlocks blocks) {
    config.gradients.blocks = blocks;
    const std::unique_ptr<Backend> backend = make_test_backend();
    size_t bytes = 0;
    const MemoryPlan plan = Engine(config, *backend).plan();
    for (const Allocation& a : plan.allocations())
      if (a.category == Category::kGradients) bytes += a.bytes;
    return bytes;
  };
  const size_t C = 64, whole = gradients(GradientBlocks::kWhole), embedding = gradients(GradientBlocks::kEmbedding);
  EXPECT_EQ(whole - embedding, 4096 * C * sizeof(float) - C * C * sizeof(float));
  EXPECT_EQ(embedding - gradients(GradientBlocks::kAll), (4 * C * C - C * C) * sizeof(bf16));
}

TEST(Blocks, NeedFusedUpdatesAndOneMicroBatch) {
  const std::unique_ptr<Backend> backend = make_test_backend();
  EngineConfig config = deep_config(5, DType::kF32);
  config.gradients.blocks = GradientBlocks::kAll;
  config.gradients.micro_batches = 2;
  EXPECT_THROW(Engine(config, *backend), std::invalid_argument);
  config.gradients.micro_batches = 1;
  config.gradients.kind = GradientMode::kDense;
  EXPECT_THROW(Engine(config, *backend), std::invalid_argument);
}

// AdamW and SGD work element by element, so the same gradient in blocks gives the same bits, whatever is rounded.
TEST(Blocks, OfOneGradientChangeNoBitOfElementwiseOptimizers) {
  for (const OptimizerKind kind : {OptimizerKind::kAdamW, OptimizerKind::kSgd}) {
    for (const DType dtype : {DType::kBF16, DType::kI8}) {
      std::vector<std::vector<uint8_t>> bits;
      for (const int64_t block_rows : {int64_t{0}, int64_t{64}}) {
        const std::unique_ptr<Backend> backend = make_test_backend();
        Parameter p;
        p.name = "w", p.layer = 0, p.rows = p.padded_rows = 200, p.cols = 96, p.matrix = p.decay = true;
        p.quantized = dtype == DType::kI8;
        OptimizerConfig config;
        config.kind = kind, config.state_dtype = DType::kI8, config.beta1 = 0.9f, config.weight_decay = 0.1f;
        config.weight_piece = 2048;
        const auto optimizer = make_optimizer(config, {p}, DType::kBF16, *backend);
        MemoryPlan plan;
        optimizer->declare(plan);
        Tensor weight, numbers, gradient;
        StepScalars* scalars = nullptr;
        void* workspace = nullptr;
        plan.add(&weight, "weight", Category::kWeights, dtype, {p.rows, p.cols});
        plan.add(&numbers, "numbers", Category::kWeights, DType::kF32, {p.rows, p.cols});
        plan.add(&gradient, "gradient", Category::kGradients, DType::kBF16, {p.rows, p.cols});
        plan.add(&scalars, "scalars", Category::kWorkspace, sizeof(StepScalars));
        plan.add(&workspace, "workspace", Category::kWorkspace, 1 << 20);
        Arena arena(*backend, std::move(plan));
        backend->set_workspace(workspace, 1 << 20);
        optimizer->states().zero();
        backend->fill_normal(numbers, 0, 0.02f, {.seed = 1});
        if (dtype == DType::kI8) backend->quantize_weight(weight, numbers, {}, nullptr);
        if (dtype != DType::kI8) backend->convert(weight, numbers);
        for (uint32_t t = 1; t <= 3; ++t) {
          StepScalars host;
          host.lr = 0.01f, host.step = t;
          optimizer->begin_step(t, host);
          backend->copy(scalars, &host, sizeof host);
          backend->fill_normal(gradient, 0, 0.01f, {.seed = 2 + t});
          if (block_rows == 0) {
            optimizer->update(p, weight, {}, gradient, scalars);
          } else {
            const Gradient blocks(p.rows, block_rows,
                                  [&](int64_t begin, int64_t count) { return gradient.slice(begin, count); });
            optimizer->update(p, weight, {}, blocks, scalars);
          }
        }
        std::vector<uint8_t> all;
        append(all, *backend, weight);
        for (const StateTensor& state : optimizer->state()) append(all, *backend, state.tensor);
        bits.push_back(all);
      }
      EXPECT_TRUE(bits[0] == bits[1]) << optimizer_name(kind) << ", " << dtype_name(dtype);
    }
  }
}

// Clipping by a second pass, with gradients in blocks: the norm is that of the whole gradient.
TEST(Blocks, ClipByTheGlobalNorm) {
  EngineConfig config = deep_config(5, DType::kF32, OptimizerKind::kAdamW);
  config.gradients.clip_norm = 0.1f;
  const Outcome whole = run(config);
  config.gradients.blocks = GradientBlocks::kAll;
  const Outcome in_blocks = run(config);
  for (uint32_t t = 0; t < kFewSteps; ++t) {
    EXPECT_NEAR(in_blocks.losses[t], whole.losses[t], 2e-5 * whole.losses[t]);
    EXPECT_NEAR(in_blocks.norms[t], whole.norms[t], 1e-4 * whole.norms[t]);
  }
}

class EightBitWeights : public ::testing::TestWithParam<OptimizerKind> {};
INSTANTIATE_TEST_SUITE_P(All, EightBitWeights,
                         ::testing::Values(OptimizerKind::kFlora, OptimizerKind::kAdamW, OptimizerKind::kAdafactor,
                                           OptimizerKind::kSgd),
                         [](const auto& info) { return optimizer_name(info.param); });

TEST_P(EightBitWeights, LearnAlmostLikeBf16) {
  const float lr = GetParam() == OptimizerKind::kSgd ? 0.05f : 2e-3f;
  EngineConfig config = deep_config(5, DType::kBF16, GetParam());
  config.model.layers = 2;
  const uint32_t steps = takes_long() ? 5 : kSteps;
  const Outcome plain = train(test_backend_name(), config, lr, steps);
  config.weight_dtype = DType::kI8;
  config.optimizer.scale_parameter = false;
  const Outcome coded = train(test_backend_name(), config, lr, steps);
  EXPECT_EQ(coded.allocated, coded.planned);
  if (steps == kSteps) {
    EXPECT_LT(coded.losses.back(), coded.losses.front() - 0.02f);
  }
  for (uint32_t t = 0; t < steps; ++t) EXPECT_NEAR(coded.losses[t], plain.losses[t], 0.02 * plain.losses[t]);
  EXPECT_TRUE(coded.bits != plain.bits);
}

// How large the pieces are in which codes are decoded and updated does not matter.
TEST_P(EightBitWeights, PiecesChangeNoBit) {
  for (const GradientBlocks blocks : {GradientBlocks::kWhole, GradientBlocks::kAll}) {
    EngineConfig config = deep_config(5, DType::kBF16, GetParam());
    config.model.layers = 1;
    config.weight_dtype = config.optimizer.state_dtype = DType::kI8;
    config.optimizer.scale_parameter = GetParam() == OptimizerKind::kAdafactor;
    config.gradients.blocks = blocks;
    const Outcome whole = run(config);
    config.optimizer.weight_piece = 1024;
    if (config.optimizer.scale_parameter) {  // a sum of squares piece by piece is another order of additions
      const Outcome pieces = run(config);
      for (uint32_t t = 0; t < kFewSteps; ++t) EXPECT_NEAR(pieces.losses[t], whole.losses[t], 1e-3 * whole.losses[t]);
    } else {
      expect_same_bits(config, whole, "pieces");
    }
  }
}

TEST_P(EightBitWeights, StreamedAndInBlocksAndWithEightBitStates) {
  EngineConfig config = deep_config(5, DType::kBF16, GetParam());
  config.model.layers = 3;
  config.weight_dtype = DType::kI8;
  config.optimizer.state_dtype = DType::kI8;
  const Outcome resident = run(config);
  config.offload = {.activations = true, .state = true, .weights = true};
  expect_same_bits(config, resident, "streamed");
  config.offload = {};
  config.gradients.blocks = GradientBlocks::kAll;
  const Outcome in_blocks = run(config);
  for (uint32_t t = 0; t < kFewSteps; ++t)
    EXPECT_NEAR(in_blocks.losses[t], resident.losses[t], 0.02 * resident.losses[t]) << "step " << t + 1;
  config.offload = {.activations = true, .state = true, .weights = true};
  expect_same_bits(config, in_blocks, "blocks, streamed");
}

}  // namespace
