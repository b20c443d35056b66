// test_elementwise.cpp: GELU, additions, conversions, scalings and sums against float64, and the gate.
#include <limits>

#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

class Elementwise : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(Elementwise);

struct Shape {
  int64_t rows, cols, pitch;
};

// From one element to several spans and blocks, contiguous and strided, with rows of whole vectors and without; those
// of a GPU only where all rows are one.
std::vector<Shape> shapes(const std::string& backend) {
  const bool cpu = backend == "cpu";
  return {{1, 1, 0},    {1, 37, 0},   {7, 80, cpu ? 97 : 104},    {7, 80, 88},
          {67, 513, 0}, {9, 1040, 0}, {67, cpu ? 513 : 512, 520}, {9, 1040, 1048}};
}

TEST_P(Elementwise, GeluForward) {
  for (const Shape& s : shapes(backend())) {
    TestDevice device(backend());
    const Tensor in = device.random(1, dtype(), {s.rows, s.cols}, 3, s.pitch);
    const Tensor out = device.poisoned(dtype(), {s.rows, s.cols}, s.pitch);
    Values expected = device.read(in);
    for (double& x : expected) x = gelu(x);
    device->gelu_forward(out, in);
    EXPECT_LE(relative_error(device.read(out), expected), tolerance(dtype()));
  }
}

TEST_P(Elementwise, GeluBackward) {
  std::vector<Shape> all = shapes(backend());
  all.push_back({1100, 272, 0});
  for (const Shape& s : all) {
    for (const bool accumulate : {false, true}) {
      TestDevice device(backend());
      const int64_t cols = row_length(backend(), s.cols);
      const Tensor in = device.random(1, dtype(), {s.rows, cols}, 3, s.pitch);
      const Tensor d = device.random(2, dtype(), {s.rows, cols}, 1, s.pitch);
      const Tensor dbias = accumulate ? device.random(3, dtype(), {cols}, 4) : device.poisoned(dtype(), {cols});
      Values expected = device.read(d), sums = accumulate ? device.read(dbias) : Values(static_cast<size_t>(cols));
      const Values x = device.read(in);
      for (size_t i = 0; i < x.size(); ++i) expected[i] *= (gelu(x[i] + 1e-5) - gelu(x[i] - 1e-5)) / 2e-5;
      device->gelu_backward(d, dbias, in, accumulate);
      const Values result = device.read(d);
      EXPECT_LE(relative_error(result, expected), tolerance(dtype()));
      for (size_t i = 0; i < result.size(); ++i) sums[i % sums.size()] += result[i];
      EXPECT_LE(relative_error(device.read(dbias), sums), tolerance(dtype())) << s.rows << " x " << cols;
    }
  }
}

// The sums are those of bias_backward(), bit for bit.
TEST_P(Elementwise, GeluBackwardSumsItsResult) {
  TestDevice device(backend());
  const Tensor d = device.random(1, dtype(), {1100, 272}), in = device.random(2, dtype(), {1100, 272}, 3);
  const Tensor dbias = device.poisoned(DType::kF32, {272}), expected = device.poisoned(DType::kF32, {272});
  device->gelu_backward(d, dbias, in, false);
  device->bias_backward(expected, d, false);
  EXPECT_EQ(device.bits(dbias), device.bits(expected));
}

// Element by element over the whole range, where a norm would hide errors of small values.
TEST_P(Elementwise, GeluOfExtremeValues) {
  TestDevice device(backend());
  const Values xs = {0.0,  -0.0, 1e-30, -1e-30, 1e-3, -1e-3, -5.0, -9.0,  9.0,  50.0,  -50.0, 1e4,
                     -1e4, 1e15, -1e15, 1e-20,  1e19, -1e19, 5e19, -5e19, 1e25, -1e25, 3e38,  -3e38};
  const int64_t count = static_cast<int64_t>(xs.size());
  const Tensor in = device.upload(xs, dtype(), {count}), out = device.poisoned(dtype(), {count});
  const Tensor d = device.upload(Values(xs.size(), 1.0), dtype(), {count});
  device->gelu_forward(out, in);
  device->gelu_backward(d, device.poisoned(dtype(), {count}), in, false);
  const Values x = device.read(in), y = device.read(out), slope = device.read(d);
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_NEAR(y[i], gelu(x[i]), tolerance(dtype()) * std::abs(x[i]) * 0.1 + 1e-35) << x[i];
    EXPECT_NEAR(slope[i],
                x[i] > 8    ? 1
                : x[i] < -8 ? 0
                            : (gelu(x[i] + 1e-5) - gelu(x[i] - 1e-5)) / 2e-5,
                tolerance(dtype()))
        << x[i];
  }
}

TEST_P(Elementwise, ScaleAndRestoreNorm) {
  for (const Shape& s : shapes(backend())) {
    TestDevice device(backend());
    const Tensor x = device.random(1, dtype(), {s.rows, s.cols}, 1, s.pitch);
    const Tensor scalars = device.upload({-0.375, 1.0, 9.0, 4.0, 0.0}, DType::kF32, {5});
    const float* values = scalars.as<float>();
    const Values before = device.read(x);
    device->scale(x, values + 1);
    EXPECT_EQ(device.read(x), before);
    device->scale(x, values);
    Values expected = before;
    for (double& value : expected) value *= -0.375;
    EXPECT_LE(relative_error(device.read(x), expected), tolerance(dtype()));
    device->restore_norm(x, values + 2, values + 4);
    EXPECT_LE(relative_error(device.read(x), expected), tolerance(dtype()));
    device->restore_norm(x, values + 2, values + 3);
    for (double& value : expected) value *= 1.5;
    EXPECT_LE(relative_error(device.read(x), expected), tolerance(dtype()));
  }
}

TEST_P(Elementwise, Sums) {
  for (const Shape& s : shapes(backend())) {
    for (const bool accumulate : {false, true}) {
      TestDevice device(backend());
      const Tensor x = device.random(1, dtype(), {s.rows, s.cols}, 1, s.pitch);
      double squares = accumulate ? 3 : 0, sum = squares, size = 0;
      for (double value : device.read(x)) {
        squares += value * value;
        sum += 0.5 * value;
        size += std::abs(value);
      }
      const Values start = accumulate ? Values{3} : Values{NAN};
      const Tensor out = device.upload(start, DType::kF32, {1});
      device->sum_squares(out, x, accumulate);
      EXPECT_LE(relative_error(device.read(out), {squares}), 1e-5);
      device.write(out, start);
      device->sum(out, x, 0.5f, accumulate);
      EXPECT_NEAR(device.read(out)[0], sum, 1e-6 * size);
    }
  }
}

// Several rounds of partial sums, and a mean that fp32 alone would lose.
TEST_P(Elementwise, SumsOfManyElements) {
  TestDevice device(backend());
  const int64_t count = 3'000'001;
  const Tensor x = device.poisoned(dtype(), {count}), out = device.poisoned(DType::kF32, {2});
  device->fill_constant(x, 1.0f);
  device->sum(out.slice(0, 1), x, 1.0f, false);
  device->sum_squares(out.slice(1, 1), x.slice(8, count - 8), false);
  EXPECT_EQ(device.read(out), (Values{3'000'001, 2'999'993}));
}

// Tensors that begin in the middle of another, on a CPU at any element, and operands of which only one does.
TEST_P(Elementwise, AnyAlignment) {
  for (const int64_t shift : row_lengths(backend(), {0, 1, 5})) {
    for (const int64_t other : row_lengths(backend(), {0, 3})) {
      TestDevice device(backend());
      const int64_t count = 777;
      const Tensor a = device.random(1, dtype(), {count + shift}).slice(shift, count);
      const Tensor b = device.poisoned(dtype(), {count + other}).slice(other, count);
      const Tensor sum = device.poisoned(DType::kF32, {1});
      Values expected = device.read(a);
      double total = 0;
      for (double value : expected) total += value * value;
      device->sum_squares(sum, a, false);
      EXPECT_LE(relative_error(device.read(sum), {total}), 1e-5);
      for (double& value : expected) value = gelu(value);
      device->gelu_forward(b, a);
      EXPECT_LE(relative_error(device.read(b), expected), tolerance(dtype()));
    }
  }
}

TEST_P(Elementwise, FillConstant) {
  for (const Shape& s : shapes(backend())) {
    TestDevice device(backend());
    const Tensor x = device.poisoned(dtype(), {s.rows, s.cols}, s.pitch);
    device->fill_constant(x, 0.5f);
    EXPECT_EQ(device.read(x), Values(static_cast<size_t>(s.rows * s.cols), 0.5));
  }
}

// Columns of several tiles and rows of several chunks, with whole vectors and without.
TEST_P(Elementwise, SumsOfColumns) {
  for (const Shape& s :
       {Shape{70, 520, 0}, Shape{70, 520, 528}, Shape{70, row_length(backend(), 521), 0}, Shape{4500, 16, 0}}) {
    for (const DType to : {DType::kF32, DType::kBF16}) {
      TestDevice device(backend());
      const Tensor x = device.random(1, dtype(), {s.rows, s.cols}, 1, s.pitch), out = device.poisoned(to, {s.cols});
      Values expected(static_cast<size_t>(s.cols));
      const Values values = device.read(x);
      for (size_t i = 0; i < values.size(); ++i) expected[i % expected.size()] += values[i];
      device->bias_backward(out, x, false);
      EXPECT_LE(relative_error(device.read(out), expected), tolerance(to)) << s.rows << " x " << s.cols;
    }
  }
}

TEST_P(Elementwise, IndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const int64_t cols = row_length(backend(), 177);
    const Tensor x = device.random(1, dtype(), {301, cols}), out = device.poisoned(dtype(), {301, cols});
    const Tensor sums = device.poisoned(DType::kF32, {2});
    device->gelu_forward(out, x);
    const Tensor dbias = device.poisoned(dtype(), {cols});
    device->gelu_backward(out, dbias, x, false);
    device->sum_squares(sums.slice(0, 1), out, false);
    device->sum(sums.slice(1, 1), out, 1.0f, false);
    std::vector<uint8_t> all = device.bits(out);
    const std::vector<uint8_t> scalars = device.bits(sums);
    all.insert(all.end(), scalars.begin(), scalars.end());
    const std::vector<uint8_t> bias_bits = device.bits(dbias);
    all.insert(all.end(), bias_bits.begin(), bias_bits.end());
    return all;
  });
}

// What the kernels of a GPU are not written for is refused, not computed wrongly: one row is at no multiple of 16
// bytes, or has no multiple of 8 columns.
class GpuRows : public OperationTest {};
INSTANTIATE_GPU_TESTS(GpuRows, DType::kF32, DType::kBF16);

TEST_P(GpuRows, OfOtherLayoutsAreRefused) {
  TestDevice device(backend());
  const int64_t rows = 4;
  const Tensor scalars = device.poisoned(DType::kF32, {rows});
  const auto refused = [&](const std::function<void(const Tensor&, const Tensor&)>& run) {
    const Tensor good = device.random(1, dtype(), {rows, 16}), padding = device.random(1, dtype(), {rows * 16 + 1});
    Tensor shifted = good;
    shifted.data = padding.slice(1, rows * 16).data;
    run(good, device.random(2, dtype(), {16}));
    EXPECT_THROW(run(shifted, device.random(2, dtype(), {16})), std::logic_error);
    EXPECT_THROW(run(device.random(1, dtype(), {rows, 16}, 1, 17), device.random(2, dtype(), {16})), std::logic_error);
    EXPECT_THROW(run(device.random(1, dtype(), {rows, 12}, 1, 16), device.random(2, dtype(), {12})), std::logic_error);
  };
  refused([&](const Tensor& x, const Tensor&) { device->gelu_forward(x, x); });
  refused([&](const Tensor& x, const Tensor&) { device->sum_squares(scalars.slice(0, 1), x, false); });
  refused([&](const Tensor& x, const Tensor& bias) { device->bias_backward(bias, x, false); });
  refused([&](const Tensor& x, const Tensor& weight) {
    device->layernorm_forward(x, scalars, scalars, x, weight, weight);
  });
  const Tensor targets = device.upload({1, 2, 3, 0}, DType::kI32, {rows});
  refused([&](const Tensor& x, const Tensor&) { device->classifier(scalars, x, targets, 9, 1.0f, true); });
  const Tensor ids = device.upload({1, 2, 3, 0}, DType::kI32, {1, rows});
  refused([&](const Tensor& x, const Tensor&) {
    device->embedding_forward(device.poisoned(dtype(), {rows, x.cols()}), ids, x, x);
  });
}

class Conversion : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Conversion, ::testing::ValuesIn(backend_names()));

TEST_P(Conversion, BetweenEveryPairOfDTypes) {
  for (const Shape& s : shapes(GetParam())) {
    for (const DType to : {DType::kF32, DType::kBF16}) {
      for (const DType from : {DType::kF32, DType::kBF16}) {
        TestDevice device(GetParam());
        const Tensor in = device.random(1, from, {s.rows, s.cols}, 1, s.pitch);
        const Tensor out = device.poisoned(to, {s.rows, s.cols});
        device->convert(out, in);
        Values expected = device.read(in);
        if (to == DType::kBF16) {
          for (double& x : expected) x = to_float(from_float<bf16>(static_cast<float>(x)));
        }
        EXPECT_EQ(device.read(out), expected);
      }
    }
  }
}

TEST_P(Conversion, OnlyConversionsTakeTwoDTypes) {
  TestDevice device(GetParam());
  const Tensor a = device.random(1, DType::kF32, {8, 16}), b = device.random(2, DType::kBF16, {8, 16});
  EXPECT_THROW(device->gelu_forward(a, b), std::logic_error);
  EXPECT_THROW(device->gelu_forward(b, a), std::logic_error);
}

TEST_P(Conversion, Increment) {
  TestDevice device(GetParam());
  const DeviceValue<uint32_t> counter(device, 41);
  device->increment(counter.data());
  EXPECT_EQ(counter.get(), 42u);
}

// NaN must come through, so that a run can see it.
TEST_P(Conversion, GeluKeepsNaN) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    TestDevice device(GetParam());
    const Tensor x = device.upload(Values(16, NAN), dtype, {16}), d = device.upload(Values(16, 1.0), dtype, {16});
    device->gelu_backward(d, device.poisoned(dtype, {16}), x, false);
    for (double value : device.read(d)) EXPECT_TRUE(std::isnan(value));
    device->gelu_forward(x, x);
    for (double value : device.read(x)) EXPECT_TRUE(std::isnan(value));
  }
}

TEST_P(Conversion, RoundsToNearestEvenAndKeepsSpecialValues) {
  TestDevice device(GetParam());
  const double ulp = 1.0 / 128, tiny = 1e-40;
  const Values xs = {1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp * 0.51, -1 - ulp * 0.49, INFINITY, -INFINITY, 3.4e38, tiny,
                     -0.0};
  const Values expected = {1, 1 + 2 * ulp, 1 + ulp, -1, INFINITY, -INFINITY, INFINITY, 0, 0};
  const int64_t count = static_cast<int64_t>(xs.size());
  const Tensor out = device.poisoned(DType::kBF16, {count});
  device->convert(out, device.upload(xs, DType::kF32, {count}));
  const Values rounded = device.read(out);
  for (size_t i = 0; i < xs.size(); ++i) {
    if (xs[i] == tiny) {
      EXPECT_NEAR(rounded[i], tiny, 1e-40);
    } else {
      EXPECT_EQ(rounded[i], expected[i]) << xs[i];
    }
  }
  const Tensor nan = device.poisoned(DType::kBF16, {1});
  device->convert(nan, device.upload({NAN}, DType::kF32, {1}));
  EXPECT_TRUE(std::isnan(device.read(nan)[0]));
}

TEST_P(Conversion, GateClosesOnNonFiniteValues) {
  for (const double value : Values{0.0, -1e30, NAN, INFINITY, -INFINITY}) {
    TestDevice device(GetParam());
    StepScalars scalars;
    const Tensor memory = device.poisoned(DType::kI32, {static_cast<int64_t>(sizeof scalars / 4)});
    device->copy(memory.data, &scalars, sizeof scalars);
    device->gate_on_finite(memory.as<StepScalars>(), device.upload({value}, DType::kF32, {1}));
    device->copy(&scalars, memory.data, sizeof scalars);
    device->synchronize();
    EXPECT_EQ(scalars.gate, std::isfinite(value) ? 1u : 0u) << value;
  }
}

}  // namespace
