// test_cpu_backend.cpp: the CPU as a device (memory, workspace, what it says about itself) and its exp.
#include "kernels/cpu/simd_math.h"
#include "tests/backends.h"

namespace {

TEST(CpuBackend, CountsTheMemoryItGivesOut) {
  const auto backend = make_cpu_backend({.threads = 2});
  EXPECT_EQ(backend->allocated_bytes(), 0u);
  void* small = backend->allocate(100);
  void* large = backend->allocate(size_t{5} << 20);
  EXPECT_EQ(backend->allocated_bytes(), (size_t{5} << 20) + 100);
  for (void* memory : {small, large}) EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 256, 0u);
  void* host = backend->allocate_host(1000);
  EXPECT_EQ(backend->allocated_bytes(), (size_t{5} << 20) + 100);
  backend->release_host(host);
  backend->release(large);
  backend->release(small);
  EXPECT_EQ(backend->allocated_bytes(), 0u);
  EXPECT_THROW(backend->release(&host), std::logic_error);
}

TEST(CpuBackend, RefusesMoreMemoryThanThereIsAndNamesTheBytes) {
  const auto backend = make_cpu_backend({.threads = 1});
  const size_t bytes = size_t{1} << 46;
  EXPECT_LT(backend->memory_available(), bytes);
  EXPECT_GT(backend->memory_available(), size_t{1} << 20);
  try {
    backend->allocate(bytes);
    FAIL() << "64 TiB were allocated";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find(std::to_string(bytes)), std::string::npos) << error.what();
  }
}

TEST(CpuBackend, DescribesItself) {
  const auto backend = make_cpu_backend({.threads = 3});
  EXPECT_EQ(backend->name(), "cpu");
  EXPECT_NE(backend->description().find("3 threads"), std::string::npos) << backend->description();
  EXPECT_THROW(make_cpu_backend({.threads = -1}), std::runtime_error);
}

TEST(CpuBackend, MeasuresItsPeak) { EXPECT_GT(make_cpu_backend()->measure_peak_flops(), 1e8); }

TEST(CpuBackend, OperationsWithoutEnoughWorkspaceAreRefused) {
  const auto backend = make_cpu_backend({.threads = 2});
  std::vector<float> qkv(30), out(10), lse(5);
  EXPECT_THROW(backend->attention_forward(Tensor::of(out.data(), DType::kF32, {1, 5, 2}),
                                          Tensor::of(lse.data(), DType::kF32, {1, 1, 5}),
                                          Tensor::of(qkv.data(), DType::kF32, {1, 5, 6}), 1),
               std::logic_error);
}

TEST(CpuBackend, CountsOperationsInTheProfiler) {
  TestDevice device("cpu");
  Profiler profiler;
  device->profiler = &profiler;
  const Tensor out = device.poisoned(DType::kF32, {8, 8});
  device->matmul(out, device.random(1, DType::kF32, {8, 8}), device.random(2, DType::kF32, {8, 8}));
  EXPECT_EQ(profiler.entries().at("matmul").calls, 1);
  EXPECT_EQ(profiler.entries().at("matmul").flops, 2.0 * 8 * 8 * 8);
}

float exp_of(float x) {
  Lanes result;
  simd_exp(result, Lanes{} + x);
  return result[kLanes - 1];
}

TEST(SimdMath, ExpIsAccurateAndSaturates) {
  double largest = 0;
  for (float x = -87; x <= 88; x += 0.00037f) {
    const double exact = std::exp(static_cast<double>(x));
    largest = std::max(largest, std::abs(exp_of(x) - exact) / exact);
  }
  EXPECT_LE(largest, 2e-7);
  EXPECT_EQ(exp_of(0.0f), 1.0f);
  EXPECT_EQ(exp_of(-INFINITY), 0.0f);
  EXPECT_EQ(exp_of(-1000.0f), 0.0f);
  EXPECT_EQ(exp_of(89.0f), INFINITY);
  EXPECT_EQ(exp_of(INFINITY), INFINITY);
  EXPECT_TRUE(std::isnan(exp_of(NAN)));
}

}  // namespace
