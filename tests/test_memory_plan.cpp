// test_memory_plan.cpp: the layout of planned memory and the arena that allocates it.
#include "kernels/memory_plan.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "kernels/backend.h"

namespace {

MemoryPlan random_plan(uint32_t seed) {
  std::mt19937 generator(seed);
  MemoryPlan plan;
  static void* ignored = nullptr;
  const int count = 1 + static_cast<int>(generator() % 60);
  for (int i = 0; i < count; ++i) {
    const uint32_t phases = 1 + generator() % 15;
    plan.add(&ignored, "a" + std::to_string(i), static_cast<Category>(generator() % kCategoryCount), generator() % 5000,
             phases, generator() % 8 == 0);
  }
  plan.layout();
  return plan;
}

TEST(MemoryPlan, AllocationsAliveTogetherNeverOverlap) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    const MemoryPlan plan = random_plan(seed);
    for (const Allocation& a : plan.allocations()) {
      EXPECT_EQ(a.offset % MemoryPlan::kAlignment, 0u);
      EXPECT_LE(a.offset + a.bytes, a.host ? plan.host_bytes() : plan.device_bytes());
      for (const Allocation& b : plan.allocations()) {
        if (&a == &b || a.host != b.host || (a.phases & b.phases) == 0 || a.bytes == 0 || b.bytes == 0) continue;
        EXPECT_TRUE(a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset) << a.name << " and " << b.name;
      }
    }
  }
}

TEST(MemoryPlan, IsDeterministic) {
  const MemoryPlan a = random_plan(7), b = random_plan(7);
  for (size_t i = 0; i < a.allocations().size(); ++i) EXPECT_EQ(a.allocations()[i].offset, b.allocations()[i].offset);
}

TEST(MemoryPlan, CategoriesAddUpToTheArena) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    const MemoryPlan plan = random_plan(seed);
    const std::vector<size_t> bytes = plan.bytes_by_category();
    EXPECT_EQ(std::accumulate(bytes.begin(), bytes.end(), size_t{0}), plan.device_bytes());
  }
}

TEST(MemoryPlan, DisjointPhasesShareBytes) {
  MemoryPlan plan;
  void* memory = nullptr;
  plan.add(&memory, "logits", Category::kActivations, 10000, kPhaseHead);
  plan.add(&memory, "recompute", Category::kWorkspace, 8000, kPhaseBackward);
  plan.add(&memory, "weights", Category::kWeights, 100, kPhaseAlways);
  plan.layout();
  EXPECT_EQ(plan.find("logits")->offset, plan.find("recompute")->offset);
  EXPECT_EQ(plan.device_bytes(), 10240u + 100u);
  const std::vector<size_t> bytes = plan.bytes_by_category();
  EXPECT_EQ(bytes[static_cast<size_t>(Category::kWeights)], 100u);
  EXPECT_EQ(bytes[static_cast<size_t>(Category::kActivations)], 10000u);  // shared bytes go to the first category
  EXPECT_EQ(bytes[static_cast<size_t>(Category::kWorkspace)], 240u);      // the gap
}

TEST(MemoryPlan, QuantizedTensorsHaveScales) {
  MemoryPlan plan;
  Tensor m;
  plan.add(&m, "m", Category::kOptimizerState, DType::kI8, {257});
  EXPECT_EQ(m.elements(), 257);
  EXPECT_TRUE(m.empty());
  EXPECT_EQ(plan.find("m")->bytes, 257u);
  EXPECT_EQ(plan.find("m.scales")->bytes, 2 * sizeof(float));
}

TEST(MemoryPlan, RejectsWhatCannotBeMeant) {
  MemoryPlan plan;
  void* memory = nullptr;
  plan.add(&memory, "a", Category::kWeights, 1);
  EXPECT_THROW(plan.add(&memory, "a", Category::kWeights, 1), std::logic_error);
  EXPECT_THROW(plan.add(&memory, "b", Category::kWeights, 1, 0), std::logic_error);
  EXPECT_THROW(plan.device_bytes(), std::logic_error);
  EXPECT_THROW(plan.bytes_by_category(), std::logic_error);
  EXPECT_EQ(plan.find("c"), nullptr);
}

TEST(Arena, AllocatesExactlyThePlan) {
  const auto backend = make_cpu_backend({.threads = 1});
  {
    MemoryPlan plan;
    Tensor w, m;
    char* staging = nullptr;
    plan.add(&w, "w", Category::kWeights, DType::kF32, {10, 100});
    plan.add(&m, "m", Category::kOptimizerState, DType::kI8, {3, 100}, kPhaseForward);
    plan.add(&staging, "staging", Category::kWorkspace, 4096, kPhaseAlways, true);
    plan.layout();
    const size_t planned = plan.device_bytes();
    Arena arena(*backend, plan);
    EXPECT_EQ(backend->allocated_bytes(), planned);
    const auto offset = [&](const void* memory) {
      return static_cast<size_t>(static_cast<const char*>(memory) - w.as<char>()) + plan.find("w")->offset;
    };
    EXPECT_EQ(offset(m.data), plan.find("m")->offset);
    EXPECT_EQ(offset(m.scales), plan.find("m.scales")->offset);
    EXPECT_EQ(w.scales, nullptr);
    EXPECT_EQ(w.rows(), 10);
    EXPECT_EQ(m.dtype, DType::kI8);
    ASSERT_NE(staging, nullptr);
    staging[4095] = 1;  // host memory
  }
  EXPECT_EQ(backend->allocated_bytes(), 0u);
}

TEST(Arena, OfAnEmptyPlanAllocatesNothing) {
  const auto backend = make_cpu_backend({.threads = 1});
  Arena arena(*backend, MemoryPlan());
  EXPECT_EQ(backend->allocated_bytes(), 0u);
}

}  // namespace
