// test_planner.cpp: the planner takes the fastest setting that fits, leaves alone what was given, and its shortcuts
// (the least bytes of a plan, groups of candidates that are rejected at once) change nothing about the result.
#include "train/planner.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "train/budget.h"
#include "train/command_line.h"
#include "train/memory_size.h"

namespace {

EngineConfig small_config() {
  EngineConfig config;
  config.model = {.vocabulary = 300, .positions = 32, .layers = 3, .heads = 2, .channels = 32};
  config.shapes = {.batch = 2, .sequence = 24, .head_chunk = 16};
  config.optimizer.rank = 8;
  return config;
}

SearchSpace everything(int64_t largest) {
  return {.micro_batch = true,
          .recompute = true,
          .head_chunk = true,
          .gradient_blocks = true,
          .offload = true,
          .sequences_per_step = 0,
          .largest_micro_batch = largest};
}

// Rates as a device might have them, and some that none has.
Rates random_rates(std::mt19937& random) {
  const auto between = [&](double low, double high) {
    return std::exp(std::uniform_real_distribution<double>(std::log(low), std::log(high))(random));
  };
  return {.copies_overlap = random() % 2 == 0,
          .flops = between(1e9, 1e15),
          .bytes = between(1e8, 1e13),
          .transfer = between(1e8, 1e12),
          .call = random() % 3 == 0 ? 0 : between(1e-7, 1e-3),
          .tiles = random() % 2 == 0 ? 0 : between(1, 1000)};
}

RunSetup undecided(std::vector<std::string> arguments, const std::string& device = "cpu") {
  arguments.insert(arguments.begin(), "train_gpt2");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  Options options;
  parse_command_line(static_cast<int>(argv.size()), argv.data(), options);
  return resolve({options, device, 257, true, ""}, Undecided::kPlannersSettings);
}

size_t bytes_of(const std::string& text) { return parse_memory_size("memory-budget", text); }

TEST(MemorySize, UnitsAreBinaryOrDecimal) {
  EXPECT_EQ(bytes_of("24GiB"), size_t{24} << 30);
  EXPECT_EQ(bytes_of("24GB"), 24000000000u);
  EXPECT_EQ(bytes_of("500MiB"), size_t{500} << 20);
  EXPECT_EQ(bytes_of("8e9"), 8000000000u);
  EXPECT_EQ(bytes_of("8G"), size_t{8} << 30);
  EXPECT_EQ(bytes_of("8gi"), size_t{8} << 30);
  EXPECT_EQ(bytes_of("1.5 kb"), 1500u);
  EXPECT_EQ(bytes_of("2TiB"), size_t{2} << 40);
  EXPECT_EQ(bytes_of("77b"), 77u);
}

TEST(MemorySize, NonsenseIsRefusedByName) {
  for (const char* text :
       {"", "GiB", "12XB", "-3GiB", "0", "0GiB", "nan", "inf", "1e40", "0.2", "0x10", "12 34", "8GBs", "8e"}) {
    try {
      bytes_of(text);
      ADD_FAILURE() << text;
    } catch (const UsageError& error) {
      EXPECT_NE(std::string(error.what()).find("GiB"), std::string::npos) << error.what();
    }
  }
}

TEST(Prediction, MoreTokensAreNeverSlowerPerToken) {
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    const Rates rates = random_rates(random);
    EngineConfig config = small_config();
    config.shapes.sequence = 1 + static_cast<int64_t>(random() % 700);
    config.shapes.head_chunk = 1 + static_cast<int64_t>(random() % 600);
    config.shapes.recompute = static_cast<Recompute>(random() % 5);
    config.gradients.blocks = static_cast<GradientBlocks>(random() % 3);
    config.offload = {random() % 2 == 0, random() % 2 == 0, random() % 2 == 0, 2};
    if (config.offload.weights) config.offload.state = true;
    const bool accumulates = random() % 2 == 0;  // the same tokens per step, in fewer micro-batches
    if (accumulates) config.gradients.blocks = GradientBlocks::kWhole;
    const EngineConfig start = config;
    double before = INFINITY;
    for (int64_t batch = 1; batch <= 48; ++batch) {
      if (accumulates && 48 % batch != 0) continue;
      config.shapes.batch = batch;
      config.gradients.micro_batches = accumulates ? static_cast<int>(48 / batch) : 1;
      config.shapes.head_chunk = std::min(start.shapes.head_chunk, batch * config.shapes.sequence);
      const double now = predict_step(config, rates, {1e5, 1e4}) / static_cast<double>(tokens_per_step(config));
      EXPECT_LT(now, before) << "case " << i << ", micro-batch " << batch;
      before = now;
    }
  }
}

TEST(Prediction, LongerChunksOfTheHeadAreFaster) {
  const Rates rates = nominal_rates(small_config(), "cuda");
  EngineConfig config = small_config();
  config.shapes.batch = 16, config.shapes.sequence = 1024;
  double before = INFINITY;
  for (const int64_t chunk : {128, 512, 2048, 8192, 16384}) {
    config.shapes.head_chunk = chunk;
    const double now = predict_step(config, rates, {});
    EXPECT_LT(now, before) << chunk;
    before = now;
  }
}

// Where memory is left the head takes all tokens at a time, else the half, the quarter, ... down to what there was.
TEST(HeadChunk, IsAsLongAsMemoryAllows) {
  const std::unique_ptr<Backend> backend = make_cpu_backend();
  EngineConfig config = small_config();
  config.shapes.batch = 16, config.shapes.sequence = 50, config.shapes.head_chunk = 64;
  config.model.positions = 50, config.model.vocabulary = 50000;
  const auto bytes = [&](int64_t chunk) {
    EngineConfig other = config;
    other.shapes.head_chunk = chunk;
    return Engine(other, *backend).plan().device_bytes();
  };
  const auto chosen = [&](size_t free) { return longest_head_chunk(config, {free, SIZE_MAX, false}, *backend); };
  const auto with_sixteenth = [](size_t plan) { return plan + plan / 15 + 16; };
  EXPECT_EQ(chosen(with_sixteenth(bytes(800))), 800);
  EXPECT_EQ(chosen(bytes(800)), 400) << "a sixteenth is left";
  EXPECT_EQ(chosen(with_sixteenth(bytes(400))), 400);
  EXPECT_EQ(chosen(with_sixteenth(bytes(100))), 100);
  EXPECT_EQ(chosen(bytes(64)), 64);
  EXPECT_EQ(chosen(0), 64) << "unknown";
}

TEST(Prediction, RecomputationAndBlocksCostTime) {
  const Rates rates = nominal_rates(small_config(), "cuda");
  EngineConfig config = small_config();
  const auto seconds = [&] { return predict_step(config, rates, {}); };
  double before = 0;
  for (const Recompute level :
       {Recompute::kNone, Recompute::kGelu, Recompute::kNormsGelu, Recompute::kAttention, Recompute::kBlock}) {
    config.shapes.recompute = level;
    EXPECT_GT(seconds(), before);
    before = seconds();
  }
  config.gradients.blocks = GradientBlocks::kEmbedding;
  EXPECT_GT(seconds(), before);
  before = seconds();
  config.gradients.blocks = GradientBlocks::kAll;
  EXPECT_GT(seconds(), before);
}

TEST(Planner, LeastBytesAreNoMoreThanThePlan) {
  const auto backend = make_cpu_backend({.threads = 1});
  const Rates rates = nominal_rates(small_config(), "cpu");
  for (const GradientMode kind : {GradientMode::kDense, GradientMode::kFused}) {
    EngineConfig config = small_config();
    config.gradients.kind = kind;
    for (const Candidate& candidate : candidates(config, everything(4), rates, *backend)) {
      const MemoryPlan plan = Engine(candidate.config, *backend).plan();
      const Bytes least = least_bytes(plan);
      EXPECT_LE(least.device, plan.device_bytes());
      EXPECT_GT(least.device, plan.device_bytes() / 2);
      EXPECT_LE(least.host, plan.host_bytes());
    }
  }
}

// Against planning every candidate, for limits at and around what some of them take.
TEST(Planner, TakesTheFastestThatFit) {
  const auto backend = make_cpu_backend({.threads = 1});
  const Rates rates = nominal_rates(small_config(), "cuda");
  for (const int64_t sequences : {0, 6}) {
    SearchSpace space = everything(8);
    space.sequences_per_step = sequences;
    const std::vector<Candidate> all = candidates(small_config(), space, rates, *backend);
    std::vector<Bytes> planned;
    for (const Candidate& candidate : all) {
      const MemoryPlan plan = Engine(candidate.config, *backend).plan();
      planned.push_back({plan.device_bytes(), plan.host_bytes()});
    }
    for (size_t i = 1; i < all.size(); ++i) {
      EXPECT_LE(all[i - 1].seconds_per_token(), all[i].seconds_per_token());
    }
    std::mt19937 random(2);
    for (int i = 0; i < 40; ++i) {
      const Bytes some = planned[random() % planned.size()];
      const MemoryLimit limit{some.device - random() % 2, some.host + random() % 2 * 100000, false};
      std::vector<size_t> expected;
      for (size_t k = 0; k < planned.size() && expected.size() < 2; ++k) {
        if (fits(planned[k], limit)) expected.push_back(planned[k].device);
      }
      std::vector<size_t> found;
      for (const Candidate& candidate : fitting(all, limit, 2, *backend)) found.push_back(candidate.device_bytes);
      EXPECT_EQ(found, expected) << limit.device;
    }
    const auto least = std::min_element(planned.begin(), planned.end(),
                                        [](const Bytes& a, const Bytes& b) { return a.device < b.device; });
    const std::optional<Candidate> small = smallest(all, {0, SIZE_MAX, false}, *backend);
    EXPECT_EQ(small->device_bytes, least->device);
    EXPECT_TRUE(fitting(all, {least->device - 1, SIZE_MAX, false}, 1, *backend).empty());
  }
}

TEST(Planner, HostAndDeviceMayBeTheSame) {
  EXPECT_TRUE(fits({10, 5}, {10, 5, false}));
  EXPECT_FALSE(fits({10, 6}, {10, 5, false}));
  EXPECT_FALSE(fits({10, 5}, {10, 14, true}));
  EXPECT_TRUE(fits({10, 5}, {10, 15, true}));
}

TEST(Planner, WhatWasGivenStays) {
  const auto backend = make_cpu_backend({.threads = 1});
  const RunSetup setup =
      undecided({"--model", "tiny", "--seq-len", "32", "--memory-budget", "1GiB", "--micro-batch", "3", "--recompute",
                 "gelu", "--offload", "activations", "--gradient-blocks", "embedding", "--head-chunk", "20"});
  const std::vector<Candidate> all =
      candidates(setup.engine, search_space(setup), nominal_rates(setup.engine, "cpu"), *backend);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(settings_flags(all[0].config),
            "--micro-batch 3 --recompute gelu --head-chunk 20 --gradient-blocks embedding --offload activations");
}

TEST(Planner, MicroBatchesDivideTheStep) {
  const auto backend = make_cpu_backend({.threads = 1});
  const auto batches = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), {"--model", "tiny", "--seq-len", "32", "--memory-budget", "1GiB"});
    const RunSetup setup = undecided(arguments);
    std::set<int64_t> found;
    for (const Candidate& candidate :
         candidates(setup.engine, search_space(setup), nominal_rates(setup.engine, "cpu"), *backend)) {
      const EngineConfig& config = candidate.config;
      found.insert(config.shapes.batch);
      EXPECT_TRUE(config.gradients.blocks == GradientBlocks::kWhole || gradient_blocks_possible(config));
      EXPECT_NO_THROW(Engine(config, *backend));
    }
    return found;
  };
  EXPECT_EQ(batches({}), (std::set<int64_t>{1, 2, 4}));  // at most a CPU's default
  EXPECT_EQ(batches({"--tokens-per-step", "384"}), (std::set<int64_t>{1, 2, 3, 4, 6, 12}));
  EXPECT_EQ(batches({"--tokens-per-step", "32"}), (std::set<int64_t>{1}));
  EXPECT_EQ(batches({"--no-factored"}), (std::set<int64_t>{1, 2, 4}));
  EXPECT_EQ(batches({"--tokens-per-step", "384", "--gradient-blocks", "all"}), (std::set<int64_t>{12}));
  EXPECT_EQ(batches({"--gradients", "dense"}), (std::set<int64_t>{1, 2, 4}));
}

TEST(Planner, AResumedRunKeepsItsNumbers) {
  RunSetup setup = undecided({"--model", "tiny", "--memory-budget", "1GiB", "--recompute", "block"});
  const auto free = [](const SearchSpace& s) {
    return std::vector<bool>{s.micro_batch, s.recompute, s.head_chunk, s.gradient_blocks, s.offload};
  };
  EXPECT_EQ(free(search_space(setup)), (std::vector<bool>{true, false, true, true, true}));
  setup.request.checkpoint = "runs/x/step_00000001";
  EXPECT_EQ(free(search_space(setup)), (std::vector<bool>{false, false, false, false, true}));
  EXPECT_EQ(free(search_space(setup, true)), (std::vector<bool>{false, true, false, false, true}));
}

TEST(Planner, TheChoiceEndsInTheOptions) {
  const RunSetup setup = undecided({"--model", "tiny", "--seq-len", "32", "--memory-budget", "1GiB"});
  EngineConfig choice = setup.engine;
  choice.shapes.batch = 2;
  choice.shapes.head_chunk = 24;
  choice.shapes.recompute = Recompute::kAttention;
  choice.gradients.blocks = GradientBlocks::kAll;
  choice.offload = {.activations = true, .state = true, .weights = true};
  const RunSetup chosen = with_settings(setup, choice);
  EXPECT_EQ(settings_flags(chosen.engine), settings_flags(choice));
  EXPECT_EQ(chosen.options.engine.shapes.batch, 2);
  EXPECT_EQ(chosen.options.tokens_per_step, 64);
  EXPECT_EQ(chosen.options.engine.shapes.recompute, Recompute::kAttention);
  EXPECT_EQ(chosen.options.engine.gradients.blocks, GradientBlocks::kAll);
  EXPECT_EQ(offload_name(chosen.options.engine.offload), "activations,weights");
  EXPECT_EQ(chosen.options.engine.shapes.head_chunk, 24);
}

TEST(Budget, WhatTheRuntimeTakesIsSetAside) {
  Job job;
  const auto device = make_planning_backend();
  Options options;
  options.memory_budget = "24GiB";
  const Budget budget = find_budget(options, *device, false, job);
  EXPECT_GT(budget.set_aside, 0u);
  EXPECT_EQ(budget.set_aside, device->runtime_bytes());
  EXPECT_EQ(budget.limit.device + budget.set_aside, size_t{24} << 30);
  options.memory_budget = "1MiB";
  EXPECT_THROW(find_budget(options, *device, false, job), std::runtime_error);
  options.memory_budget = "auto";
  EXPECT_THROW(find_budget(options, *device, false, job), UsageError);

  const auto cpu = make_cpu_backend({.threads = 1});
  options.memory_budget = "1000TiB";  // a run gets no more than there is
  EXPECT_LE(find_budget(options, *cpu, true, job).limit.device, cpu->memory_available() + (size_t{1} << 30));
  EXPECT_GT(find_budget(options, *cpu, false, job).limit.device, size_t{900} << 40);
}

TEST(Rates, AreMeasuredOrNominal) {
  const auto backend = make_cpu_backend({.threads = 1});
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    EngineConfig config = small_config();
    config.shapes.dtype = dtype;
    const Rates measured = measure_rates(config, *backend);
    EXPECT_TRUE(measured.measured);
    EXPECT_EQ(backend->allocated_bytes(), 0u);
    for (const double rate : {measured.flops, measured.bytes, measured.transfer}) {
      EXPECT_GT(rate, 1e7);
      EXPECT_LT(rate, 1e13);
    }
  }
  const Rates nominal = measure_rates(small_config(), *make_planning_backend());  // which cannot allocate
  EXPECT_FALSE(nominal.measured);
  EXPECT_EQ(nominal.flops, nominal_rates(small_config(), "cuda").flops);
}

}  // namespace
