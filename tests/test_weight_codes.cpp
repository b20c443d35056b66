// test_weight_codes.cpp: 8-bit weights against float64: the codes of a fresh tensor and of an update, which scales
// stay, the rounding's mean, and what pieces of a tensor have in common with the whole.
#include <cmath>
#include <utility>

#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

constexpr int64_t kBlock = kQuantBlock;
const RandomKey kKey{.seed = 3, .purpose = RandomPurpose::kWeightRounding, .tensor = 9, .offset = 5};

StepScalars step(uint32_t t) {
  StepScalars scalars;
  scalars.step = t;
  return scalars;
}

Values codes(const TestDevice& device, const Tensor& t) {
  Values values;
  for (uint8_t byte : device.bits(t)) values.push_back(static_cast<int8_t>(byte));
  return values;
}

Tensor scale_tensor(const Tensor& t) { return Tensor::of(t.scales, DType::kF32, {quant_blocks(t.elements())}); }
Values scales(const TestDevice& device, const Tensor& t) { return device.read(scale_tensor(t)); }

std::vector<uint8_t> all_bits(const TestDevice& device, const Tensor& t) {
  std::vector<uint8_t> bits;
  append_bits(device, bits, t);
  return bits;
}

// The largest magnitude of each block.
Values largest_of(const Values& x) {
  Values largest(static_cast<size_t>(quant_blocks(static_cast<int64_t>(x.size()))));
  for (size_t i = 0; i < x.size(); ++i) largest[i / kBlock] = std::max(largest[i / kBlock], std::fabs(x[i]));
  return largest;
}

// Blocks whose numbers differ in size by orders of magnitude.
Values weights(TestDevice& device, uint32_t seed, int64_t count) {
  Values x = device.read(device.random(seed, DType::kF32, {count}, 0.02));
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t block = i / kBlock;
    x[i] = block % 5 == 3 ? 0.0 : std::ldexp(x[i], static_cast<int>(block % 7) * -9);
  }
  return x;
}

class WeightCodes : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, WeightCodes, ::testing::ValuesIn(backend_names()));

TEST_P(WeightCodes, FreshOnesAreTheNearest) {
  for (int64_t count : {1, 255, 256, 257, 70001}) {
    TestDevice device(GetParam());
    const Values x = weights(device, 1, count), largest = largest_of(x);
    const Tensor out = device.poisoned(DType::kI8, {count});
    device->quantize_weight(out, device.upload(x, DType::kF32, {count}), kKey, nullptr);
    const Values c = codes(device, out), s = scales(device, out);
    Values expected;
    for (size_t i = 0; i < s.size(); ++i) ASSERT_NEAR(s[i], 1.125 * largest[i] / 127, 1e-6 * s[i]) << i;
    for (size_t i = 0; i < x.size(); ++i) {
      const double scale = s[i / kBlock], exact = scale > 0 ? x[i] / scale : 0;
      ASSERT_LE(std::fabs(c[i] - exact), 0.5 + 1e-5) << i;
      expected.push_back(scale * c[i]);
    }
    for (DType wide : {DType::kF32, DType::kBF16}) {
      const Tensor back = device.poisoned(wide, {count});
      device->dequantize_weight(back, out);
      EXPECT_LE(relative_error(device.read(back), expected), tolerance(wide) * 0.5);
    }
  }
}

TEST_P(WeightCodes, TiesGoToTheEvenCode) {
  TestDevice device(GetParam());
  float largest = 112.8888f;  // of which the scale is 1: codes are the numbers themselves
  while (largest * (1.125f / 127.0f) < 1.0f) largest = std::nextafter(largest, 200.0f);
  Values x(kBlock, static_cast<double>(largest));
  for (size_t i = 1; i < x.size(); ++i) x[i] = static_cast<double>(i % 101) - 50.5;
  const Tensor out = device.poisoned(DType::kI8, {kBlock});
  device->quantize_weight(out, device.upload(x, DType::kF32, {kBlock}), kKey, nullptr);
  const Values c = codes(device, out);
  ASSERT_EQ(scales(device, out), Values{1.0});
  for (size_t i = 1; i < x.size(); ++i) {
    EXPECT_EQ(std::fmod(c[i], 2), 0.0) << x[i] << " " << c[i];
    EXPECT_EQ(std::fabs(c[i] - x[i]), 0.5);
  }
}

// Codes that were never made: their scales are NaN, and an update makes them anew.
Tensor never_made(TestDevice& device, const Tensor& out) {
  const int64_t blocks = quant_blocks(out.elements());
  device.write(Tensor::of(out.scales, DType::kF32, {blocks}), Values(static_cast<size_t>(blocks), NAN));
  return out;
}

TEST_P(WeightCodes, UpdatesAreOneOfTheTwoNeighbours) {
  for (int64_t count : {1, 255, 256, 257, 20011}) {
    TestDevice device(GetParam());
    const DeviceValue<StepScalars> scalars(device, step(4));
    const Tensor out = never_made(device, device.poisoned(DType::kI8, {count}));
    const Values x = weights(device, 1, count), largest = largest_of(x);
    const Tensor in = device.upload(x, DType::kF32, {count});
    device->quantize_weight(out, in, kKey, scalars.data());
    const Values c = codes(device, out), s = scales(device, out);
    for (size_t i = 0; i < s.size(); ++i) ASSERT_NEAR(s[i], 1.125 * largest[i] / 127, 1e-6 * s[i]) << i;
    size_t up = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = s[i / kBlock] > 0 ? x[i] / s[i / kBlock] : 0, floor = std::floor(exact);
      ASSERT_TRUE(std::fabs(c[i] - exact) < 1.00001 && std::fabs(c[i]) <= 127) << x[i] << " " << c[i];
      const uint64_t at = kKey.offset + i;
      const double sum = exact + static_cast<double>(uniform_from_word(philox_block(kKey, 4, at / 4).w[at % 4]));
      if (std::fabs(sum - std::nearbyint(sum)) > 1e-4) {
        ASSERT_EQ(c[i], std::floor(sum)) << i;
      }
      up += c[i] > floor;
    }
    if (count > 10000) {
      EXPECT_NEAR(static_cast<double>(up) / static_cast<double>(count), 0.4, 0.02);  // a fifth is zeros
    }
    EXPECT_EQ(device.read(in), x);
  }
}

TEST_P(WeightCodes, RoundingIsUnbiasedAndDiffersFromStepToStep) {
  constexpr int64_t kCount = 512;
  constexpr int kDraws = 4000;
  TestDevice device(GetParam());
  DeviceValue<StepScalars> scalars(device);
  const Values x = device.read(device.random(1, DType::kF32, {kCount}, 0.02));
  const Tensor in = device.upload(x, DType::kF32, {kCount}), out = device.poisoned(DType::kI8, {kCount});
  device->quantize_weight(out, in, kKey, nullptr);
  const Values s = scales(device, out);
  Values sums(kCount), previous;
  double pairs = 0, correlation = 0;
  for (int draw = 0; draw < kDraws; ++draw) {
    scalars.set(step(static_cast<uint32_t>(draw)));
    device->quantize_weight(out, in, kKey, scalars.data());
    const Values c = codes(device, out);
    if (draw < 3) {
      EXPECT_NE(c, previous);
    }
    for (size_t i = 0; i < c.size(); ++i) sums[i] += c[i];
    for (size_t i = 0; i + 1 < c.size(); ++i) {
      correlation += (c[i] - x[i] / s[i / kBlock]) * (c[i + 1] - x[i + 1] / s[(i + 1) / kBlock]);
      pairs += 1;
    }
    previous = c;
  }
  ASSERT_EQ(scales(device, out), s);
  // Each mean's standard deviation is at most half a code over the root of the draws.
  double mean = 0, chi_squared = 0, freedom = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = x[i] / s[i / kBlock], fraction = exact - std::floor(exact);
    const double error = sums[i] / kDraws - exact, variance = fraction * (1 - fraction) / kDraws;
    EXPECT_LT(std::fabs(error), 5 * 0.5 / std::sqrt(kDraws)) << i;
    mean += error / kCount;
    if (fraction > 0.01 && fraction < 0.99) chi_squared += error * error / variance, freedom += 1;
  }
  EXPECT_LT(std::fabs(mean), 4 * 0.5 / std::sqrt(kDraws * static_cast<double>(kCount)));
  EXPECT_NEAR(chi_squared / freedom, 1.0, 5 * std::sqrt(2 / freedom));
  EXPECT_LT(std::fabs(correlation / pairs), 5 * 0.25 / std::sqrt(pairs));
}

TEST_P(WeightCodes, ScalesStayWhileTheWeightsFit) {
  TestDevice device(GetParam());
  const DeviceValue<StepScalars> scalars(device, step(1));
  const Values sizes = {1.0, 1.12, 1.126, 0.57, 0.56, 0.0, 100.0};
  const bool stays[] = {true, true, false, true, false, false, false};
  const int64_t count = static_cast<int64_t>(sizes.size()) * kBlock;
  Values x = device.read(device.random(1, DType::kF32, {count}, 0.02));
  const Values largest = largest_of(x);
  const Tensor in = device.upload(x, DType::kF32, {count}), out = device.poisoned(DType::kI8, {count});
  device->quantize_weight(out, in, kKey, nullptr);
  const Values before = scales(device, out);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= sizes[i / kBlock];
  device.write(in, x);
  device->quantize_weight(out, in, kKey, scalars.data());
  const Values after = scales(device, out);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const double expected = stays[i] ? before[i] : 1.125 * largest[i] * sizes[i] / 127;
    EXPECT_NEAR(after[i], expected, stays[i] ? 0.0 : 1e-6 * expected) << sizes[i];
  }
  for (double code : codes(device, out)) EXPECT_LE(std::fabs(code), 127);
}

// Weights that did not move keep their codes, whatever the step: decoding and encoding is the identity.
TEST_P(WeightCodes, WeightsAtRestStay) {
  TestDevice device(GetParam());
  const int64_t count = 5003;
  const Values x = weights(device, 2, count);
  const Tensor out = device.poisoned(DType::kI8, {count}), back = device.poisoned(DType::kF32, {count});
  device->quantize_weight(out, device.upload(x, DType::kF32, {count}), kKey, nullptr);
  const std::vector<uint8_t> before = all_bits(device, out);
  int64_t changed = 0;
  DeviceValue<StepScalars> scalars(device);
  for (uint32_t t = 0; t < 20; ++t) {
    scalars.set(step(t));
    device->dequantize_weight(back, out);
    device->quantize_weight(out, back, kKey, scalars.data());
    const std::vector<uint8_t> after = all_bits(device, out);
    for (size_t i = 0; i < after.size(); ++i) changed += after[i] != before[i];
  }
  EXPECT_EQ(changed, 0);
}

TEST_P(WeightCodes, AClosedGateChangesNothing) {
  TestDevice device(GetParam());
  StepScalars closed = step(2);
  closed.gate = 0;
  const DeviceValue<StepScalars> scalars(device, closed);
  const Tensor out = device.poisoned(DType::kI8, {700}), in = device.random(1, DType::kF32, {700});
  device->quantize_weight(out, in, kKey, nullptr);
  const std::vector<uint8_t> before = all_bits(device, out);
  device->quantize_weight(out, device.random(2, DType::kF32, {700}), kKey, scalars.data());
  EXPECT_EQ(all_bits(device, out), before);
}

TEST_P(WeightCodes, ZerosTinyAndHugeNumbers) {
  for (bool update : {false, true}) {
    TestDevice device(GetParam());
    const DeviceValue<StepScalars> scalars(device, step(2));
    Values x(static_cast<size_t>(6 * kBlock));
    const auto set = [&](size_t block, size_t i, double value) { x[block * static_cast<size_t>(kBlock) + i] = value; };
    set(1, 3, -0.0);
    set(2, 7, 1e-38), set(2, 8, -1e-45);
    set(3, 7, -1e-44);  // the scale would be less than the smallest number there is
    set(4, 0, 3e38), set(4, 1, -3e38), set(4, 2, 1e-30);
    set(5, 0, 2.0), set(5, 1, -1.0);
    const Tensor out = never_made(device, device.poisoned(DType::kI8, {6 * kBlock}));
    const Tensor back = device.poisoned(DType::kF32, {6 * kBlock});
    device->quantize_weight(out, device.upload(x, DType::kF32, {6 * kBlock}), kKey, update ? scalars.data() : nullptr);
    device->dequantize_weight(back, out);
    const Values c = codes(device, out), s = scales(device, out), values = device.read(back);
    for (size_t i = 0; i < 2 * static_cast<size_t>(kBlock); ++i) EXPECT_EQ(c[i], 0.0);
    EXPECT_EQ(s[0], 0.0);
    EXPECT_EQ(s[1], 0.0);
    const double error = update ? 1.0 : 0.5;
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_LE(std::fabs(values[i] - x[i]), error * 1.001 * s[i / kBlock] + 2e-44) << i;
    }
  }
}

// A weight that is not a number must be seen, not turned into one.
TEST_P(WeightCodes, NumbersThatAreNotFiniteSpoilTheirBlock) {
  for (double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    for (bool update : {false, true}) {
      TestDevice device(GetParam());
      const DeviceValue<StepScalars> scalars(device, step(2));
      Values x(static_cast<size_t>(2 * kBlock), 0.5);
      const Tensor in = device.upload(x, DType::kF32, {2 * kBlock}), out = device.poisoned(DType::kI8, {2 * kBlock});
      const Tensor back = device.poisoned(DType::kF32, {2 * kBlock});
      device->quantize_weight(out, in, kKey, nullptr);
      x[100] = bad;
      device.write(in, x);
      device->quantize_weight(out, in, kKey, update ? scalars.data() : nullptr);
      device->dequantize_weight(back, out);
      const Values values = device.read(back);
      for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(std::isfinite(values[i]), i >= kBlock) << i;
    }
  }
}

TEST_P(WeightCodes, PiecesHaveTheCodesOfTheWhole) {
  TestDevice device(GetParam());
  const DeviceValue<StepScalars> scalars(device, step(7));
  const int64_t rows = 48, cols = 80;  // 16 rows are 5 blocks
  const Tensor in = device.random(1, DType::kF32, {rows, cols}, 0.02);
  const Tensor whole = never_made(device, device.poisoned(DType::kI8, {rows, cols}));
  const Tensor pieces = never_made(device, device.poisoned(DType::kI8, {rows, cols}));
  device->quantize_weight(whole, in, kKey, scalars.data());
  const Tensor back = device.poisoned(DType::kBF16, {rows, cols}),
               back_pieces = device.poisoned(DType::kBF16, {rows, cols});
  for (int64_t begin : {32, 0, 16}) {
    RandomKey key = kKey;
    key.offset += static_cast<uint64_t>(begin * cols);
    device->quantize_weight(pieces.slice(begin, 16), in.slice(begin, 16), key, scalars.data());
    device->dequantize_weight(back_pieces.slice(begin, 16), pieces.slice(begin, 16));
  }
  device->dequantize_weight(back, whole);
  EXPECT_EQ(all_bits(device, pieces), all_bits(device, whole));
  EXPECT_EQ(device.bits(back_pieces), device.bits(back));
  EXPECT_EQ(pieces.slice(32, 4).scales, pieces.scales + 10);
  EXPECT_THROW(pieces.slice(3, 16), std::logic_error);
}

TEST_P(WeightCodes, IsIndependentOfThreads) {
  expect_independent_of_threads(GetParam(), [&](TestDevice& device) {
    const DeviceValue<StepScalars> scalars(device, step(2));
    const Tensor out = never_made(device, device.poisoned(DType::kI8, {50001}));
    device->quantize_weight(out, device.random(1, DType::kF32, {50001}), kKey, scalars.data());
    return all_bits(device, out);
  });
}

}  // namespace
