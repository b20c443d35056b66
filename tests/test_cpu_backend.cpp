// test_cpu_backend.cpp: the CPU as a device (memory, workspace, what it says about itself) and its loops on
// registers.
#include "kernels/cpu/simd_math.h"

#include <gtest/gtest.h>

#include <limits>
#include <type_traits>

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

float exp2_of(float x) {
  Lanes result;
  simd_exp2(result, Lanes{} + x);
  return result[kLanes - 1];
}

TEST(SimdMath, Exp2IsAccurateAndSaturates) {
  double largest = 0;
  for (float x = -126; x < 127.5f; x += 0.00051f) {
    const double exact = std::exp2(static_cast<double>(x));
    largest = std::max(largest, std::abs(exp2_of(x) - exact) / exact);
  }
  EXPECT_LE(largest, 2e-7);
  for (int n = -126; n <= 127; ++n) EXPECT_EQ(exp2_of(static_cast<float>(n)), std::ldexp(1.0f, n)) << n;
  EXPECT_GT(exp2_of(-126.5f), 0.0f);
  for (const float low : {-126.75f, -127.0f, -1000.0f, -INFINITY}) EXPECT_EQ(exp2_of(low), 0.0f) << low;
  for (const float high : {127.5f, 128.0f, 1000.0f, INFINITY}) EXPECT_EQ(exp2_of(high), INFINITY) << high;
  // Quiet and signalling, of either sign, with any payload.
  for (const uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800001u, 0xff812345u}) {
    EXPECT_TRUE(std::isnan(exp2_of(bits_to_float(bits)))) << bits;
  }
}

TEST(Lanes, PairsOfBf16AreRoundedAsSingleOnes) {
  std::vector<float> values = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, std::numeric_limits<float>::max(), 1e-45f};
  for (const uint32_t bits :
       {0x7f800001u, 0xff80ffffu, 0x7fffffffu, 0xffffffffu, 0x3f808000u, 0x3f818000u, 0x3f808001u})
    values.push_back(bits_to_float(bits));
  for (uint64_t bits = 0; bits < 1ull << 32; bits += 4093) values.push_back(bits_to_float(static_cast<uint32_t>(bits)));
  std::vector<bf16> rounded(values.size());
  for (size_t i = 0; i + 2 * kLanes <= values.size(); i += 2 * kLanes) {
    LanePair pair;
    for (int l = 0; l < kLanes; ++l) {  // the even ones, and the odd ones
      pair.first[l] = values[i + 2 * l];
      pair.second[l] = values[i + 2 * l + 1];
    }
    store_pair(&rounded[i], pair);
    for (size_t j = i; j < i + 2 * kLanes; ++j) {
      ASSERT_EQ(rounded[j].bits, from_float<bf16>(values[j]).bits) << float_to_bits(values[j]);
    }
  }
}

template <typename T>
class LanesOf : public testing::Test {};
using LaneTypes = testing::Types<float, bf16>;
TYPED_TEST_SUITE(LanesOf, LaneTypes);

// Integers from -50 to 50, exact in either type.
template <typename T>
std::vector<T> integers(int64_t count, int64_t first) {
  std::vector<T> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(from_float<T>(static_cast<float>((first + i * 37) % 101 - 50)));
  return numbers;
}

TYPED_TEST(LanesOf, MapNumbersKeepsPlacesAndEnds) {
  for (int64_t count = 0; count <= 5 * kLanes + 3; ++count) {
    const auto a = integers<TypeParam>(count, 1), b = integers<TypeParam>(count, 7);
    std::vector<TypeParam> out(static_cast<size_t>(count) + 1, from_float<TypeParam>(99.0f));
    map_numbers(
        count, [](Lanes& r, const Lanes& x, const Lanes& y) { r = 2.0f * x + y; }, out.data(), a.data(), b.data());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(to_float(out[i]), 2.0f * to_float(a[i]) + to_float(b[i])) << count;
    EXPECT_EQ(to_float(out.back()), 99.0f) << count;
    const auto other = integers<std::conditional_t<std::is_same_v<TypeParam, float>, bf16, float>>(count, 7);
    map_numbers(
        count, [](Lanes& r, const Lanes& x, const Lanes& y) { r = x - y; }, out.data(), a.data(), other.data());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(to_float(out[i]), to_float(a[i]) - to_float(other[i])) << count;
    EXPECT_EQ(to_float(out.back()), 99.0f) << count;
    auto in_place = a;
    map_numbers(
        count, [](Lanes& r, const Lanes& x) { r = -x; }, in_place.data(), in_place.data());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(to_float(in_place[i]), -to_float(a[i])) << count;
  }
}

TYPED_TEST(LanesOf, AccumulateTakesEachNumberOnce) {
  for (int64_t count = 0; count <= 9 * kLanes + 3; ++count) {
    auto numbers = integers<TypeParam>(count, 3);
    double sum = 0, largest = -1000;
    for (const TypeParam number : numbers)
      sum += to_float(number), largest = std::max<double>(largest, to_float(number));
    numbers.push_back(from_float<TypeParam>(1e6f));  // not to be read
    Accumulators sums = {}, maxima;
    accumulate_numbers(
        sums, count, [](Lanes& total, const Lanes& x) { total += x; }, numbers.data());
    EXPECT_EQ(sums.sum(), sum) << count;
    std::fill_n(maxima.lanes, std::size(maxima.lanes), Lanes{} - 1000.0f);
    accumulate_numbers(
        maxima, count, [](Lanes& maximum, const Lanes& x) { larger(maximum, x, maximum); }, numbers.data());
    EXPECT_EQ(maxima.maximum(), largest) << count;
  }
}

}  // namespace
