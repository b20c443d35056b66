// test_quantize.cpp: 8-bit block-wise states: the code maps of backend.h, their error, and their edges.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/backends.h"

namespace {

double expected_code(double x, double s, DType dtype) {
  if (x == 0) return 0;
  const double ratio = std::fabs(x) / s;
  if (dtype == DType::kI8) return std::copysign(std::nearbyint(127 * std::sqrt(ratio)), x);
  return std::max(1.0, std::nearbyint(255 * std::pow(ratio, 0.25)));
}

double expected_value(double code, double s, DType dtype) {
  return dtype == DType::kI8 ? s * std::copysign(std::pow(code / 127, 2), code) : s * std::pow(code / 255, 4);
}

Values codes(const TestDevice& device, const Tensor& t) {
  Values values;
  for (uint8_t byte : device.bits(t)) values.push_back(t.dtype == DType::kI8 ? static_cast<int8_t>(byte) : byte);
  return values;
}

Values scales(const TestDevice& device, const Tensor& t) {
  return device.read(Tensor::of(t.scales, DType::kF32, {quant_blocks(t.elements())}));
}

class Quantize : public OperationTest {};
INSTANTIATE_ON_BACKENDS(Quantize, backend_names(), DType::kI8, DType::kU8);

TEST_P(Quantize, FollowsTheCodeMap) {
  for (int64_t count : {1, 255, 256, 257, 70001}) {
    TestDevice device(backend());
    const Tensor in = device.random(5, DType::kF32, {count});
    Values x = device.read(in);
    if (dtype() == DType::kU8) {
      for (double& value : x) value = static_cast<double>(static_cast<float>(value * value * value * value));
      device.write(in, x);
    }
    const Tensor out = device.poisoned(dtype(), {count});
    device->quantize(out, in);
    const Values actual = codes(device, out), largest = scales(device, out);
    Values expected;
    for (size_t i = 0; i < x.size(); ++i) {
      double s = 0;
      for (size_t j = i / 256 * 256; j < std::min(x.size(), (i / 256 + 1) * 256); ++j) s = std::max(s, std::fabs(x[j]));
      ASSERT_EQ(largest[i / 256], s);
      ASSERT_NEAR(actual[i], expected_code(x[i], s, dtype()), 1) << x[i] / s;
      expected.push_back(expected_value(actual[i], s, dtype()));
    }
    for (DType wide : {DType::kF32, DType::kBF16}) {
      const Tensor back = device.poisoned(wide, {count});
      device->dequantize(back, out);
      EXPECT_LE(relative_error(device.read(back), expected), tolerance(wide) * 0.5);
    }
    EXPECT_LE(relative_error(expected, x), 0.01);
  }
}

// A second trip changes nothing: codes and scales are a fixed point, so resuming from a checkpoint is exact.
TEST_P(Quantize, IsIdempotent) {
  TestDevice device(backend());
  Values x = device.read(device.random(6, DType::kF32, {1000}));
  for (double& value : x) value = dtype() == DType::kU8 ? value * value : value;
  const Tensor once = device.poisoned(dtype(), {1000}), twice = device.poisoned(dtype(), {1000});
  const Tensor back = device.poisoned(DType::kF32, {1000});
  device->quantize(once, device.upload(x, DType::kF32, {1000}));
  device->dequantize(back, once);
  device->quantize(twice, back);
  EXPECT_EQ(device.bits(once), device.bits(twice));
}

TEST_P(Quantize, BlocksOfZerosAndTinyNumbers) {
  TestDevice device(backend());
  Values x(768, 0.0);
  x[300] = 1.0, x[301] = 1e-30, x[302] = 1e-38;
  for (size_t i = 512; i < 768; ++i) x[i] = 1e-40;  // subnormal
  const Tensor out = device.poisoned(dtype(), {768});
  device->quantize(out, device.upload(x, DType::kF32, {768}));
  const Values c = codes(device, out);
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(c[i], 0);
  EXPECT_EQ(scales(device, out)[0], 0.0);
  EXPECT_EQ(c[300], dtype() == DType::kI8 ? 127 : 255);
  // A positive second moment never becomes zero, whatever it stands next to; a momentum may.
  EXPECT_EQ(c[301], dtype() == DType::kI8 ? 0 : 1);
  EXPECT_EQ(c[302], dtype() == DType::kI8 ? 0 : 1);
  for (size_t i = 512; i < 768; ++i) EXPECT_EQ(c[i], dtype() == DType::kI8 ? 127 : 255);
}

TEST_P(Quantize, IsIndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const Tensor out = device.poisoned(dtype(), {50001});
    device->quantize(out, device.random(1, DType::kF32, {50001}));
    return device.bits(out);
  });
}

}  // namespace
