// test_matmul.cpp: Backend::matmul and bias_backward against float64 loops: transposes, dtypes, strides, accumulation.
#include "tests/backends.h"

namespace {

struct Case {
  int64_t m, n, k;
  bool transpose_a = false, transpose_b = false, accumulate = false, bias = false;
  float alpha = 1.0f;
};

Values reference(const Case& c, const Values& a, const Values& b, const Values& old, const Values& bias) {
  Values out(static_cast<size_t>(c.m * c.n));
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        sum += a[static_cast<size_t>(c.transpose_a ? k * c.m + i : i * c.k + k)] *
               b[static_cast<size_t>(c.transpose_b ? j * c.k + k : k * c.n + j)];
      }
      const size_t at = static_cast<size_t>(i * c.n + j);
      out[at] = c.alpha * sum + (c.accumulate ? old[at] : 0.0) + (c.bias ? bias[static_cast<size_t>(j)] : 0.0);
    }
  }
  return out;
}

struct DTypes {
  DType out, a, b;
};

// `gap` extra elements between the rows of every matrix.
void check(const std::string& backend, const Case& c, DTypes dtypes, int64_t gap = 0) {
  SCOPED_TRACE("m " + std::to_string(c.m) + " n " + std::to_string(c.n) + " k " + std::to_string(c.k) + " transposed " +
               std::to_string(c.transpose_a) + std::to_string(c.transpose_b) + " accumulate " +
               std::to_string(c.accumulate) + " bias " + std::to_string(c.bias) + " out " + dtype_name(dtypes.out) +
               " a " + dtype_name(dtypes.a) + " b " + dtype_name(dtypes.b));
  TestDevice device(backend);
  auto pitch = [&](int64_t cols) { return gap > 0 ? cols + gap : 0; };
  const Tensor a = c.transpose_a ? device.random(1, dtypes.a, {c.k, c.m}, 1, pitch(c.m))
                                 : device.random(1, dtypes.a, {c.m, c.k}, 1, pitch(c.k));
  const Tensor b = c.transpose_b ? device.random(2, dtypes.b, {c.n, c.k}, 1, pitch(c.k))
                                 : device.random(2, dtypes.b, {c.k, c.n}, 1, pitch(c.n));
  const Tensor bias = device.random(3, dtypes.b, {c.n}, 3);
  const Tensor out = c.accumulate ? device.random(4, dtypes.out, {c.m, c.n}, 5, pitch(c.n))
                                  : device.poisoned(dtypes.out, {c.m, c.n}, pitch(c.n));
  const Values expected = reference(c, device.read(a), device.read(b), device.read(out), device.read(bias));
  device->matmul(out, a, b,
                 {.transpose_a = c.transpose_a,
                  .transpose_b = c.transpose_b,
                  .accumulate = c.accumulate,
                  .alpha = c.alpha,
                  .bias = c.bias ? bias : Tensor{}});
  EXPECT_LE(relative_error(device.read(out), expected), tolerance(dtypes.out));
}

class Matmul : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(Matmul);

TEST_P(Matmul, OddSizesInEveryTransposition) {
  const DTypes same = {dtype(), dtype(), dtype()};
  for (int transposes = 0; transposes < 4; ++transposes) {
    for (const bool accumulate : {false, true}) {
      for (Case c : {Case{1, 1, 1}, Case{1, 77, 33}, Case{5, 1, 19}, Case{33, 65, 7}, Case{127, 50, 131}}) {
        c.transpose_a = transposes & 1;
        c.transpose_b = transposes & 2;
        c.accumulate = accumulate;
        check(backend(), c, same);
      }
    }
  }
}

TEST_P(Matmul, BiasAndAlpha) {
  const DTypes same = {dtype(), dtype(), dtype()};
  for (const int64_t m : {1, 3, 130}) {
    for (const bool accumulate : {false, true}) {
      check(backend(),
            {.m = m, .n = 67, .k = 41, .transpose_b = true, .accumulate = accumulate, .bias = true, .alpha = -0.75f},
            same);
    }
  }
}

TEST_P(Matmul, StridedRows) {
  const DTypes same = {dtype(), dtype(), dtype()};
  for (int transposes = 0; transposes < 4; ++transposes) {
    for (const int64_t m : {1, 45}) {
      check(backend(),
            {.m = m,
             .n = 37,
             .k = 29,
             .transpose_a = (transposes & 1) != 0,
             .transpose_b = (transposes & 2) != 0,
             .accumulate = m == 1,
             .bias = true},
            same, 11);
    }
  }
}

// Larger than one tile of rows, columns and depth, so that partial tiles and sums over several panels occur.
TEST_P(Matmul, SeveralTiles) {
  const DTypes same = {dtype(), dtype(), dtype()};
  check(backend(), {.m = 521, .n = 60, .k = 401, .bias = true}, same);
  check(backend(), {.m = 40, .n = 1031, .k = 390, .transpose_b = true, .accumulate = true}, same);
  check(backend(), {.m = 530, .n = 1030, .k = 5, .transpose_a = true}, same);
  check(backend(), {.m = 17, .n = 19, .k = 2050, .transpose_a = true, .transpose_b = true, .alpha = 0.5f}, same);
}

TEST_P(Matmul, SameBitsTwice) {
  expect_repeatable(backend(), [&](TestDevice& device) {
    const Tensor out = device.poisoned(dtype(), {131, 203});
    device->matmul(out, device.random(1, dtype(), {131, 97}), device.random(2, dtype(), {97, 203}));
    return device.bits(out);
  });
}

TEST_P(Matmul, WrongShapesAreRefused) {
  TestDevice device(backend());
  const Tensor a = device.random(1, dtype(), {4, 5}), b = device.random(2, dtype(), {6, 7});
  const Tensor out = device.poisoned(dtype(), {4, 7});
  EXPECT_THROW(device->matmul(out, a, b), std::logic_error);
}

class MixedMatmul : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, MixedMatmul, ::testing::ValuesIn(backend_names()));

TEST_P(MixedMatmul, EveryMixOfDTypes) {
  for (int mix = 1; mix < 7; ++mix) {
    auto pick = [&](int bit) { return (mix >> bit) & 1 ? DType::kBF16 : DType::kF32; };
    const DTypes dtypes = {pick(0), pick(1), pick(2)};
    for (const bool accumulate : {false, true}) {
      check(GetParam(), {.m = 35, .n = 43, .k = 395, .accumulate = accumulate, .bias = true}, dtypes);
      check(GetParam(), {.m = 1, .n = 43, .k = 31, .transpose_b = true, .accumulate = accumulate}, dtypes, 3);
      check(GetParam(), {.m = 21, .n = 5, .k = 31, .transpose_a = true, .accumulate = accumulate}, dtypes, 2);
    }
  }
}

class BiasBackward : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(BiasBackward);

TEST_P(BiasBackward, SumsOverRows) {
  for (const bool accumulate : {false, true}) {
    for (const int64_t rows : {1, 2, 19, 1100}) {
      for (const int64_t cols : {1, 80, 301}) {
        TestDevice device(backend());
        const Tensor dout = device.random(1, dtype(), {rows, cols}, 1, rows == 19 ? cols + 5 : 0);
        const Tensor dbias = accumulate ? device.random(2, dtype(), {cols}, 4) : device.poisoned(dtype(), {cols});
        Values expected = accumulate ? device.read(dbias) : Values(static_cast<size_t>(cols));
        const Values gradient = device.read(dout);
        for (size_t i = 0; i < gradient.size(); ++i) expected[i % static_cast<size_t>(cols)] += gradient[i];
        device->bias_backward(dbias, dout, accumulate);
        EXPECT_LE(relative_error(device.read(dbias), expected), tolerance(dtype())) << rows << " x " << cols;
      }
    }
  }
}

TEST_P(BiasBackward, IndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const Tensor dbias = device.poisoned(dtype(), {301});
    device->bias_backward(dbias, device.random(1, dtype(), {1033, 301}), false);
    return device.bits(dbias);
  });
}

}  // namespace
