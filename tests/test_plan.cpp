// test_plan.cpp: the memory plan is the truth. For every optimizer x mode x recompute level x dtypes an engine takes
// from the device exactly the bytes that were planned and asks for nothing more while it trains.
#include <gtest/gtest.h>

#include "tests/gpt2_bench.h"
#include "train/engine.h"

namespace {

Gpt2Config odd_config() {
  Gpt2Config config;
  config.vocabulary = 131, config.positions = 24, config.layers = 2, config.heads = 3, config.channels = 36;
  return config;
}

EngineConfig base_config() {
  EngineConfig config;
  config.model = odd_config();
  config.shapes = {.batch = 2, .sequence = 11, .head_chunk = 8};
  config.optimizer.rank = 8;
  config.optimizer.kappa = 2;
  return config;
}

// Plans, allocates and trains two steps.
void expect_planned(const EngineConfig& config, const std::string& what) {
  const auto backend = make_cpu_backend({.threads = 1});
  {
    Engine engine(config, *backend);
    const MemoryPlan plan = engine.plan();
    EXPECT_EQ(backend->allocated_bytes(), 0u) << what << ": planning took memory";
    size_t charged = 0;
    for (const size_t bytes : plan.bytes_by_category()) charged += bytes;
    EXPECT_EQ(charged, plan.device_bytes()) << what;

    engine.allocate();
    EXPECT_EQ(backend->allocated_bytes(), plan.device_bytes()) << what;
    EXPECT_EQ(engine.arena().plan().device_bytes(), plan.device_bytes()) << what;

    engine.model().initialize(1);
    const BenchBatch batch = BenchBatch::random(2, 11, config.model.vocabulary, 3);
    for (uint32_t t = 1; t <= 2 && config.shapes.training; ++t) {
      const StepResult result = engine.step(t, 1e-3f, [&](int) { return batch.host(); });
      EXPECT_TRUE(std::isfinite(result.loss) && result.loss > 3) << what << ": loss " << result.loss;
      EXPECT_TRUE(std::isfinite(result.grad_norm) && result.grad_norm > 0) << what;
    }
    EXPECT_GT(engine.evaluate(batch.host()), 3.0) << what;
    EXPECT_EQ(backend->allocated_bytes(), plan.device_bytes()) << what << ": training took more memory";
  }
  EXPECT_EQ(backend->allocated_bytes(), 0u) << what << ": memory was not given back";
}

class Plan : public ::testing::TestWithParam<std::tuple<OptimizerKind, GradientMode>> {};

TEST_P(Plan, IsWhatIsAllocated) {
  const auto [optimizer, mode] = GetParam();
  const DType f32 = DType::kF32, b16 = DType::kBF16;
  struct Types {
    DType weight, activation, gradient, state;
    bool master;
  };
  for (const Recompute recompute :
       {Recompute::kNone, Recompute::kGelu, Recompute::kNormsGelu, Recompute::kAttention, Recompute::kBlock}) {
    for (const Types types :
         {Types{f32, f32, f32, f32, false}, Types{b16, b16, b16, b16, false}, Types{b16, b16, b16, DType::kI8, false},
          Types{b16, b16, f32, f32, true}, Types{f32, b16, f32, DType::kI8, false}}) {
      for (const int micro_batches : {1, 3}) {
        EngineConfig config = base_config();
        config.shapes.recompute = recompute;
        config.shapes.dtype = types.activation;
        config.weight_dtype = types.weight;
        config.master_weights = types.master;
        config.optimizer.kind = optimizer;
        config.optimizer.state_dtype = types.state;
        config.optimizer.rank = optimizer == OptimizerKind::kFlora ? 8 : 0;
        config.gradients.kind = mode;
        config.gradients.micro_batches = micro_batches;
        config.gradients.gradient_dtype = types.gradient;
        config.gradients.accumulation_dtype = types.weight;
        config.gradients.accumulation_rank = mode == GradientMode::kCompressed ? 5 : 0;
        expect_planned(config, "recompute " + std::to_string(static_cast<int>(recompute)) + ", weights " +
                                   dtype_name(types.weight) + ", gradients " + dtype_name(types.gradient) +
                                   ", states " + dtype_name(types.state) + (types.master ? ", master" : "") + ", " +
                                   std::to_string(micro_batches) + " micro-batches");
      }
    }
  }
}

std::string case_name(const ::testing::TestParamInfo<Plan::ParamType>& info) {
  const char* optimizers[] = {"flora", "adamw", "adafactor", "sgd"};
  const char* modes[] = {"dense", "fused", "compressed"};
  return std::string(optimizers[static_cast<int>(std::get<0>(info.param))]) + "_" +
         modes[static_cast<int>(std::get<1>(info.param))];
}

INSTANTIATE_TEST_SUITE_P(All, Plan,
                         ::testing::Combine(::testing::Values(OptimizerKind::kFlora, OptimizerKind::kAdamW,
                                                              OptimizerKind::kAdafactor, OptimizerKind::kSgd),
                                            ::testing::Values(GradientMode::kDense, GradientMode::kFused,
                                                              GradientMode::kCompressed)),
                         case_name);

TEST(PlanVariants, AreWhatIsAllocated) {
  const auto with = [](const char* what, const auto& change) {
    EngineConfig config = base_config();
    change(config);
    expect_planned(config, what);
  };
  with("forward only", [](EngineConfig& c) { c.shapes.training = false; });
  with("untied head", [](EngineConfig& c) { c.model.tied_head = false; });
  with("no momentum", [](EngineConfig& c) { c.optimizer.beta1 = 0; });
  with("sgd with momentum", [](EngineConfig& c) { c.optimizer.kind = OptimizerKind::kSgd, c.optimizer.beta1 = 0.9f; });
  with("unfactored", [](EngineConfig& c) { c.optimizer.factored = false; });
  with("no momentum of embeddings", [](EngineConfig& c) { c.optimizer.embedding_momentum = false; });
  with("embeddings compressed", [](EngineConfig& c) { c.optimizer.compress_embeddings = true; });
  with("embeddings' sums compressed", [](EngineConfig& c) {
    c.gradients.kind = GradientMode::kCompressed, c.gradients.accumulation_rank = 4,
    c.gradients.compress_embeddings = true;
    c.gradients.micro_batches = 2;
  });
  with("rank above every matrix", [](EngineConfig& c) { c.optimizer.rank = 1000; });
  for (const TransferKind transfer : {TransferKind::kReencode, TransferKind::kRestart, TransferKind::kRescale}) {
    with("transforms instead of projections", [&](EngineConfig& c) {
      c.optimizer.rank = c.gradients.accumulation_rank = c.model.channels - 4;
      c.optimizer.transfer = transfer, c.optimizer.residual = transfer == TransferKind::kReencode;
      c.optimizer.projection = c.gradients.projection = ProjectionKind::kCosine;
      c.gradients.kind = GradientMode::kCompressed, c.gradients.micro_batches = 2;
    });
    for (const auto projection : {ProjectionKind::kGaussian, ProjectionKind::kRademacher, ProjectionKind::kCosine}) {
      with("transfer", [&](EngineConfig& c) {
        c.optimizer.residual = projection == ProjectionKind::kCosine;
        c.optimizer.transfer = transfer, c.optimizer.projection = projection, c.gradients.projection = projection;
      });
    }
  }
  for (const GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
    with("clipped", [&](EngineConfig& c) {
      c.gradients.kind = mode, c.gradients.clip_norm = 1, c.gradients.micro_batches = 2;
      c.gradients.accumulation_rank = mode == GradientMode::kCompressed ? 4 : 0;
    });
  }
  const auto offload_all = [](EngineConfig& c) {
    c.offload = {.activations = true, .state = true, .weights = true, .layers_in_flight = 2};
    c.shapes.recompute = Recompute::kBlock;
  };
  const auto bf16_all = [](EngineConfig& c) {
    c.shapes.dtype = c.weight_dtype = c.gradients.gradient_dtype = c.optimizer.state_dtype = DType::kBF16;
  };
  for (const OptimizerKind optimizer :
       {OptimizerKind::kFlora, OptimizerKind::kAdamW, OptimizerKind::kAdafactor, OptimizerKind::kSgd}) {
    for (const auto blocks : {GradientBlocks::kWhole, GradientBlocks::kEmbedding, GradientBlocks::kAll}) {
      for (const bool offload : {false, true}) {
        for (const DType weights : {DType::kF32, DType::kBF16, DType::kI8}) {
          for (const bool tied : {true, false}) {
            with("offload, blocks, dtypes of weights", [&](EngineConfig& c) {
              if (weights != DType::kF32) bf16_all(c);
              if (weights == DType::kI8) c.weight_dtype = c.optimizer.state_dtype = DType::kI8;
              if (offload) offload_all(c);
              c.optimizer.kind = optimizer;
              c.gradients.blocks = blocks;
              c.model.tied_head = tied;
            });
          }
        }
      }
    }
  }
  with("streamed with master weights and several micro-batches", [&](EngineConfig& c) {
    bf16_all(c);
    offload_all(c);
    c.master_weights = true;
    c.gradients.micro_batches = 3;
    c.optimizer.kind = OptimizerKind::kAdamW;
  });
  with("forward only, streamed", [&](EngineConfig& c) { offload_all(c), c.shapes.training = false; });
  with("one layer, streamed", [&](EngineConfig& c) { offload_all(c), c.model.layers = 1; });
  with("fused with projected sums", [](EngineConfig& c) {
    c.gradients.kind = GradientMode::kFused, c.gradients.accumulation_rank = 4, c.gradients.micro_batches = 2;
  });
}

}  // namespace
