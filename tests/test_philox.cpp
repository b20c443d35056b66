// test_philox.cpp: the random numbers of docs/numerics.md: the generator against published vectors, the numbers made
// from its words against float64 and against the text of the specification, and the tensors filled with them.
#include "kernels/cpu/philox_lanes.h"
#include "kernels/philox.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "tests/backends.h"

namespace {

constexpr uint32_t kOnes = 0xffffffffu;

void expect_words(const PhiloxWords& actual, std::initializer_list<uint32_t> expected) {
  int i = 0;
  for (uint32_t word : expected) EXPECT_EQ(actual.w[i++], word);
}

// The known answers that come with Random123.
TEST(Philox, KnownAnswers) {
  expect_words(philox4x32(0, 0, 0, 0, 0, 0), {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  expect_words(philox4x32(kOnes, kOnes, kOnes, kOnes, kOnes, kOnes),
               {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  expect_words(philox4x32(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u),
               {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

TEST(Philox, StreamsAreNamedBySeedPurposeTensorAndStep) {
  const RandomKey key{.seed = 1, .purpose = RandomPurpose::kProjection, .tensor = 7};
  const uint64_t k = splitmix64(1 + 2 * 0x9E3779B97F4A7C15ull);
  const uint64_t block = (uint64_t{5} << 32) + 3;
  const PhiloxWords expected = philox4x32(3, 5, 7, 11, static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32));
  const PhiloxWords actual = philox_block(key, 11, block);
  for (int w = 0; w < 4; ++w) EXPECT_EQ(actual.w[w], expected.w[w]);
  EXPECT_EQ(splitmix64(0), 0xE220A8397B1DCDAFull);  // first output of Vigna's generator seeded with 0
}

TEST(Philox, LanesAreTheBlocksOneByOne) {
  const RandomKey key{.seed = 99, .purpose = RandomPurpose::kInit, .tensor = 123};
  for (uint64_t first : {uint64_t{0}, uint64_t{17}, (uint64_t{1} << 32) - 5}) {
    uint32_t words[4 * kPhiloxLanes];
    float normals[4 * kPhiloxLanes];
    philox_lanes(words, philox_key(key), key.tensor, 4, first);
    normals_from_words(normals, words);
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const PhiloxWords block = philox_block(key, 4, first + static_cast<uint64_t>(lane));
      for (int w = 0; w < 4; ++w) ASSERT_EQ(words[4 * lane + w], block.w[w]);
      for (int pair = 0; pair < 2; ++pair) {
        float first_normal, second_normal;
        normal_pair(block.w[2 * pair], block.w[2 * pair + 1], first_normal, second_normal);
        ASSERT_EQ(normals[4 * lane + 2 * pair], first_normal);
        ASSERT_EQ(normals[4 * lane + 2 * pair + 1], second_normal);
      }
    }
  }
}

// Box-Muller of the same words in float64. The sine and cosine of quarter turns are exact zeros here, not 6e-17.
void expect_normal_pair(uint32_t wa, uint32_t wb) {
  float first, second;
  normal_pair(wa, wb, first, second);
  const double u = ((wa >> 8) + 1.0) * 0x1p-24, angle = 2 * std::numbers::pi * (wb >> 8) * 0x1p-24;
  const double radius = std::sqrt(-2 * std::log(u));
  ASSERT_NEAR(first, radius * std::cos(angle), 1e-6 * std::fabs(radius * std::cos(angle)) + 1e-14) << wa << " " << wb;
  ASSERT_NEAR(second, radius * std::sin(angle), 1e-6 * std::fabs(radius * std::sin(angle)) + 1e-14) << wa << " " << wb;
}

TEST(Normals, AreBoxMullerToOnePartInAMillion) {
  const RandomKey key{.seed = 5, .purpose = RandomPurpose::kInit, .tensor = 1};
  for (uint64_t block = 0; block < 200000; ++block) {
    const PhiloxWords words = philox_block(key, 0, block);
    expect_normal_pair(words.w[0], words.w[1]);
    expect_normal_pair(words.w[2], words.w[3]);
  }
}

TEST(Normals, AreAccurateAtTheEdges) {
  for (uint32_t a = 0; a < 2000; ++a) {
    for (uint32_t wa : {a << 8, kOnes - (a << 8), 0xB504F300u - 256000u + (a << 8)}) {  // u near 0, 1, sqrt(1/2)
      for (uint32_t wb : {0u, 0x1FFFFFFFu, 0x20000000u, 0x3FFFFFFFu, 0x40000000u, 0x80000000u, 0xC0000000u, kOnes})
        expect_normal_pair(wa, wb);
    }
  }
  float first, second;
  normal_pair(kOnes, 12345u << 8, first, second);
  EXPECT_EQ(std::fabs(first), 0.0f);
  EXPECT_EQ(std::fabs(second), 0.0f);
}

TEST(Normals, HaveTheMomentsOfANormalDistribution) {
  TestDevice device("cpu");
  constexpr int64_t kCount = 1 << 20;
  const Tensor x = device.poisoned(DType::kF32, {kCount});
  device->fill_normal(x, 0, 1, {.seed = 3, .purpose = RandomPurpose::kInit, .tensor = 8});
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, neighbours = 0, last = 0;
  for (double v : device.read(x)) {
    m1 += v, m2 += v * v, m3 += v * v * v, m4 += v * v * v * v, neighbours += v * last;
    last = v;
  }
  const double n = kCount, sigma = 1 / std::sqrt(n);
  EXPECT_NEAR(m1 / n, 0, 4 * sigma);
  EXPECT_NEAR(m2 / n, 1, 4 * std::sqrt(2.0) * sigma);
  EXPECT_NEAR(m3 / n, 0, 4 * std::sqrt(15.0) * sigma);
  EXPECT_NEAR(m4 / n, 3, 4 * std::sqrt(96.0) * sigma);
  EXPECT_NEAR(neighbours / n, 0, 4 * sigma);
}

TEST(Uniforms, AreTheUpperBits) {
  EXPECT_EQ(uniform_from_word(0), 0.0f);
  EXPECT_EQ(uniform_from_word(0x80000000u), 0.5f);
  EXPECT_EQ(uniform_from_word(kOnes), 1.0f - 0x1p-24f);
}

TEST(StochasticRounding, TakesTheSpecifiedBits) {
  const PhiloxWords words{{0x11112222u, 0x33334444u, 0x55556666u, 0x77778888u}};
  const uint32_t expected[] = {0x2222, 0x1111, 0x4444, 0x3333, 0x6666, 0x5555, 0x8888, 0x7777};
  for (uint64_t i = 0; i < 16; ++i) EXPECT_EQ(rounding_bits(words, i), expected[i % 8]);
}

TEST(StochasticRounding, IsUnbiased) {
  for (float value : {1.0f + 0x1p-10f, -3.3f, 1e-20f, 0x1.2345p-130f}) {
    double sum = 0;
    for (uint32_t z = 0; z < 65536; ++z) sum += to_float(round_stochastic(value, z));
    EXPECT_NEAR(sum / 65536 / static_cast<double>(value), 1.0, 1e-7) << value;
  }
}

TEST(StochasticRounding, LeavesWhatNeedsNoRounding) {
  for (uint32_t z : {0u, 1u, 32768u, 65535u}) {
    for (float value : {0.0f, 1.0f, -2.5f, INFINITY, -INFINITY}) EXPECT_EQ(to_float(round_stochastic(value, z)), value);
    EXPECT_TRUE(std::isnan(to_float(round_stochastic(NAN, z))));
    EXPECT_TRUE(std::isnan(to_float(round_stochastic(bits_to_float(0x7f800001u), z))));
  }
}

class FillNormal : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(FillNormal);

TEST_P(FillNormal, NumbersElementsByPosition) {
  TestDevice device(backend());
  const RandomKey key{.seed = 11, .purpose = RandomPurpose::kInit, .tensor = 3};
  for (int64_t count : {1, 3, 64, 777, 40000}) {
    const Tensor x = device.poisoned(dtype(), {count});
    device->fill_normal(x, 0.5f, 0.02f, key);
    Values expected;
    for (int64_t i = 0; i < count; ++i) {
      const PhiloxWords words = philox_block(key, 0, static_cast<uint64_t>(i / 4));
      float pair[2];
      normal_pair(words.w[i % 4 / 2 * 2], words.w[i % 4 / 2 * 2 + 1], pair[0], pair[1]);
      expected.push_back(0.5 + 0.02 * static_cast<double>(pair[i % 2]));
    }
    EXPECT_LE(relative_error(device.read(x), expected), tolerance(dtype()));
  }
}

TEST_P(FillNormal, PartsAreWhatTheyAreInTheWhole) {
  TestDevice device(backend());
  RandomKey key{.seed = 11, .purpose = RandomPurpose::kInit, .tensor = 3};
  const Tensor whole = device.poisoned(dtype(), {5000});
  device->fill_normal(whole, 0, 1, key);
  for (uint64_t offset : {1u, 2u, 63u, 258u, 4000u}) {
    const Tensor part = device.poisoned(dtype(), {1000});
    key.offset = offset;
    device->fill_normal(part, 0, 1, key);
    EXPECT_EQ(device.bits(part), device.bits(whole.slice(static_cast<int64_t>(offset), 1000)));
  }
}

TEST_P(FillNormal, IsIndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const Tensor x = device.poisoned(dtype(), {100001});
    device->fill_normal(x, 0, 1, {.seed = 1});
    return device.bits(x);
  });
}

}  // namespace
