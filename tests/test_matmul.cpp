// test_matmul.cpp: Backend::matmul and bias_backward against float64 loops: transposes, dtypes, strides, alignment,
// accumulation; and that choosing algorithms by measuring changes nothing but speed.
#include <cstdlib>

#include "tests/backends.h"

namespace {

const bool kProducts = with_products();

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

// A matrix as a product takes it: a GPU multiplies in bf16 what meets a bf16 matrix.
Values operand(TestDevice& device, const Tensor& t, DType other) {
  Values values = device.read(t);
  if (device->name() == "cpu" || t.dtype == other) return values;
  for (double& value : values) value = to_float(from_float<bf16>(static_cast<float>(value)));
  return values;
}

// `gap` extra elements between the rows of every matrix.
void check(TestDevice& device, const Case& c, DTypes dtypes, int64_t gap = 0) {
  SCOPED_TRACE("m " + std::to_string(c.m) + " n " + std::to_string(c.n) + " k " + std::to_string(c.k) + " transposed " +
               std::to_string(c.transpose_a) + std::to_string(c.transpose_b) + " accumulate " +
               std::to_string(c.accumulate) + " bias " + std::to_string(c.bias) + " out " + dtype_name(dtypes.out) +
               " a " + dtype_name(dtypes.a) + " b " + dtype_name(dtypes.b));
  auto pitch = [&](int64_t cols) { return gap > 0 ? cols + gap : 0; };
  const Tensor a = c.transpose_a ? device.random(1, dtypes.a, {c.k, c.m}, 1, pitch(c.m))
                                 : device.random(1, dtypes.a, {c.m, c.k}, 1, pitch(c.k));
  const Tensor b = c.transpose_b ? device.random(2, dtypes.b, {c.n, c.k}, 1, pitch(c.k))
                                 : device.random(2, dtypes.b, {c.k, c.n}, 1, pitch(c.n));
  const Tensor bias = device.random(3, dtypes.b, {c.n}, 3);
  const Tensor out = c.accumulate ? device.random(4, dtypes.out, {c.m, c.n}, 5, pitch(c.n))
                                  : device.poisoned(dtypes.out, {c.m, c.n}, pitch(c.n));
  const Values expected =
      reference(c, operand(device, a, b.dtype), operand(device, b, a.dtype), device.read(out), device.read(bias));
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

// By the processor's bf16 instructions, where it has them, whether they are faster or not.
std::vector<std::string> bf16_backends() {
  for (const std::string& name : backend_names())
    if (name == "cpu") return {"cpu_bf16"};
  return {};
}
INSTANTIATE_TEST_SUITE_P(Instructions, Matmul,
                         ::testing::Combine(::testing::ValuesIn(bf16_backends()), ::testing::Values(DType::kBF16)),
                         operation_test_name);

TEST_P(Matmul, OddSizesInEveryTransposition) {
  TestDevice device(backend());
  const DTypes same = {dtype(), dtype(), dtype()};
  for (int transposes = 0; transposes < 4; ++transposes) {
    for (const bool accumulate : {false, true}) {
      for (Case c : {Case{1, 1, 1}, Case{1, 77, 33}, Case{5, 1, 19}, Case{33, 65, 7}, Case{127, 50, 131}}) {
        c.transpose_a = transposes & 1;
        c.transpose_b = transposes & 2;
        c.accumulate = accumulate;
        check(device, c, same);
      }
    }
  }
}

TEST_P(Matmul, BiasAndAlpha) {
  TestDevice device(backend());
  const DTypes same = {dtype(), dtype(), dtype()};
  for (const int64_t m : {1, 3, 130}) {
    for (const bool accumulate : {false, true}) {
      check(device,
            {.m = m, .n = 67, .k = 41, .transpose_b = true, .accumulate = accumulate, .bias = true, .alpha = -0.75f},
            same);
    }
  }
}

TEST_P(Matmul, StridedRows) {
  TestDevice device(backend());
  const DTypes same = {dtype(), dtype(), dtype()};
  for (int transposes = 0; transposes < 4; ++transposes) {
    for (const int64_t m : {1, 45}) {
      check(device,
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
  TestDevice device(backend());
  const DTypes same = {dtype(), dtype(), dtype()};
  check(device, {.m = 521, .n = 60, .k = 401, .bias = true}, same);
  check(device, {.m = 40, .n = 1031, .k = 390, .transpose_b = true, .accumulate = true}, same);
  check(device, {.m = 530, .n = 1030, .k = 5, .transpose_a = true}, same);
  check(device, {.m = 17, .n = 19, .k = 2050, .transpose_a = true, .transpose_b = true, .alpha = 0.5f}, same);
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

// The matrix [rows, cols] with normal values, or poison, `offset` elements after the beginning of a buffer.
Tensor shifted(TestDevice& device, uint32_t seed, DType dtype, int64_t rows, int64_t cols, int64_t offset) {
  const int64_t elements = rows * cols + offset;
  Tensor t = seed > 0 ? device.random(seed, dtype, {elements}) : device.poisoned(dtype, {elements});
  return Tensor::of(t.as<char>() + static_cast<size_t>(offset) * dtype_size(dtype), dtype, {rows, cols});
}

// Slices of tensors start anywhere: no load may be wider than the address allows.
TEST_P(Matmul, MisalignedAddresses) {
  TestDevice device(backend());
  for (int which = 1; which < 16; ++which) {
    SCOPED_TRACE(which);
    const Case c = {
        .m = 24, .n = 40, .k = 32, .transpose_b = which % 2 == 0, .accumulate = which % 3 == 0, .bias = true};
    const Tensor a = shifted(device, 1, dtype(), c.m, c.k, which & 1);
    const Tensor b = shifted(device, 2, dtype(), c.transpose_b ? c.n : c.k, c.transpose_b ? c.k : c.n, which >> 1 & 1);
    const Tensor bias = shifted(device, 3, dtype(), 1, c.n, which >> 2 & 1).view({c.n});
    const Tensor out = shifted(device, 4, dtype(), c.m, c.n, which >> 3 & 1);
    const Values expected = reference(c, device.read(a), device.read(b), device.read(out), device.read(bias));
    device->matmul(out, a, b, {.transpose_b = c.transpose_b, .accumulate = c.accumulate, .bias = bias});
    EXPECT_LE(relative_error(device.read(out), expected), tolerance(dtype()));
  }
}

TEST_P(Matmul, BiasOfAnotherDType) {
  const DType other = dtype() == DType::kF32 ? DType::kBF16 : DType::kF32;
  TestDevice device(backend());
  const Tensor a = device.random(1, dtype(), {48, 32}), b = device.random(2, dtype(), {32, 64});
  const Tensor bias = device.random(3, other, {64}, 3), out = device.poisoned(dtype(), {48, 64});
  const Case c = {.m = 48, .n = 64, .k = 32, .bias = true};
  device->matmul(out, a, b, {.bias = bias});
  const Values expected = reference(c, device.read(a), device.read(b), {}, device.read(bias));
  EXPECT_LE(relative_error(device.read(out), expected), tolerance(dtype()));
}

// The fake cuBLASLt of tests/cublaslt looks at an environment variable while this lives.
class Setting {
 public:
  Setting(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Setting() { unsetenv(name_); }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  const char* name_;
};

bool has_fake_cublaslt(TestDevice& device) {
  const std::string device_name = device->description();
  return device_name.starts_with("CUDA on CPU") || device_name.starts_with("PTX interpreter");
}

// The bits of products of several kinds, some added to what is there.
std::vector<std::vector<uint8_t>> several_products(TestDevice& device, DType dtype) {
  std::vector<std::vector<uint8_t>> products;
  for (const bool accumulate : {false, true}) {
    const Tensor a = device.random(1, dtype, {40, 200}), b = device.random(2, dtype, {200, 48});
    const Tensor out = device.random(3, dtype, {40, 48}), bias = device.random(4, dtype, {48});
    device->matmul(out, a, b, {.accumulate = accumulate, .bias = bias});
    products.push_back(device.bits(out));
    device->matmul(out, a, b);
    products.push_back(device.bits(out));
  }
  return products;
}

TEST_P(Matmul, TuningCarriesTheChoices) {
  std::string tuning;
  std::vector<std::vector<uint8_t>> expected;
  {
    const Setting other_algorithm("FAKE_CUBLASLT_ALGORITHM", "2");
    TestDevice first(backend());
    EXPECT_EQ(first->tuning(), "");
    expected = several_products(first, dtype());
    tuning = first->tuning();
    EXPECT_EQ(tuning.find('\n'), std::string::npos);
    EXPECT_EQ(several_products(first, dtype()), expected);
    EXPECT_EQ(first->tuning(), tuning) << "the same shapes again are nothing new";
  }
  TestDevice before(backend());
  before->set_tuning(tuning);
  EXPECT_EQ(before->tuning(), tuning);
  EXPECT_EQ(several_products(before, dtype()), expected);
  EXPECT_EQ(before->tuning(), tuning);

  TestDevice after(backend());
  several_products(after, dtype());
  after->set_tuning(tuning);
  EXPECT_EQ(after->tuning(), tuning);
  EXPECT_EQ(several_products(after, dtype()), expected);
}

// Two measurements may find different algorithms the fastest: what has to have the same bits does not measure.
TEST_P(Matmul, ForeignTuningIsIgnored) {
  std::string tuning;
  {
    const Setting other_algorithm("FAKE_CUBLASLT_ALGORITHM", "2");
    TestDevice measured(backend());
    several_products(measured, dtype());
    tuning = measured->tuning();
  }
  const auto products_with = [&](const std::string& text) {
    TestDevice device(backend());
    device->end_tuning();
    device->set_tuning(text);
    return several_products(device, dtype());
  };
  const auto untuned = products_with(""), tuned = products_with(tuning);
  std::string other_version = tuning;
  if (!tuning.empty()) other_version.replace(tuning.find(' ') + 1, 1, "x");
  for (const std::string& foreign : {std::string("garbage"), std::string("; : ; ; :"), other_version})
    EXPECT_EQ(products_with(foreign), untuned) << foreign;
  for (const std::string& longer : {tuning + "; ", tuning + "; x"}) EXPECT_EQ(products_with(longer), tuned) << longer;
  const auto half = products_with(tuning.substr(0, tuning.size() / 2));
  for (size_t i = 0; i < half.size(); ++i) EXPECT_TRUE(half[i] == tuned[i] || half[i] == untuned[i]) << i;
}

// ---- what only a GPU has: graphs, and a library with a choice of algorithms

class GpuMatmul : public OperationTest {};
INSTANTIATE_GPU_TESTS(GpuMatmul, DType::kF32, DType::kBF16);

// Nothing can be measured while a graph is recorded. What runs then is what runs when the graph is replayed.
TEST_P(GpuMatmul, Captured) {
  TestDevice device(backend());
  ASSERT_TRUE(device->can_capture());
  const Case c = {.m = 40, .n = 48, .k = 56, .accumulate = true, .bias = true};
  const Tensor a = device.random(1, dtype(), {c.m, c.k}), b = device.random(2, dtype(), {c.k, c.n});
  const Tensor bias = device.random(3, dtype(), {c.n}), out = device.random(4, dtype(), {c.m, c.n});
  const Tensor other = device.random(5, dtype(), {8, 8});
  device->matmul(device.poisoned(dtype(), {8, 8}), other, other);  // starts the library, which a recording may not
  const std::vector<uint8_t> before = device.bits(out);
  Values expected = device.read(out);
  device->begin_capture();
  device->matmul(out, a, b, {.accumulate = true, .bias = bias});
  const int graph = device->end_capture();
  EXPECT_EQ(device.bits(out), before);
  for (int i = 0; i < 2; ++i) {
    expected = reference(c, device.read(a), device.read(b), expected, device.read(bias));
    device->replay(graph);
    EXPECT_LE(relative_error(device.read(out), expected), tolerance(dtype()));
  }
}

// What the library says of damaged algorithms is its own affair, as long as it refuses them.
TEST_P(GpuMatmul, DamagedTuningIsIgnored) {
  TestDevice measured(backend()), damaged(backend()), untuned(backend());
  if (!has_fake_cublaslt(measured)) GTEST_SKIP() << "needs the fake cuBLASLt";
  {
    const Setting other_algorithm("FAKE_CUBLASLT_ALGORITHM", "2");
    several_products(measured, dtype());
  }
  std::string tuning = measured->tuning();
  for (size_t i = tuning.find("; "); i < tuning.size(); ++i) {
    if (tuning[i] == '0') tuning[i] = '7';
  }
  damaged->set_tuning(tuning);
  EXPECT_EQ(several_products(damaged, dtype()), several_products(untuned, dtype()));
}

TEST_P(GpuMatmul, NoAlgorithm) {
  TestDevice device(backend());
  if (!has_fake_cublaslt(device)) GTEST_SKIP() << "needs the fake cuBLASLt";
  const Setting none("FAKE_CUBLASLT_NO_ALGORITHM", "1");
  const Tensor a = device.random(1, dtype(), {16, 32}), b = device.random(2, dtype(), {32, 64});
  const Tensor out = device.poisoned(dtype(), {16, 64});
  try {
    device->matmul(out, a, b);
    ADD_FAILURE() << "no error";
  } catch (const std::runtime_error& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("[16,32]x[32,64]"), std::string::npos) << what;
    EXPECT_NE(what.find(dtype_name(dtype())), std::string::npos) << what;
    EXPECT_NE(what.find("CUBLAS_STATUS_NOT_SUPPORTED"), std::string::npos) << what;
  }
  // Odd sizes are nobody's fault: the plain kernel computes them, and says so.
  EXPECT_EQ(device->slow_products(), "");
  const Tensor odd_a = device.random(1, dtype(), {17, 23}), odd_b = device.random(2, dtype(), {23, 19});
  const Tensor odd_out = device.poisoned(dtype(), {17, 19});
  const Values expected = reference({.m = 17, .n = 19, .k = 23}, device.read(odd_a), device.read(odd_b), {}, {});
  device->matmul(odd_out, odd_a, odd_b);
  device->matmul(odd_out, odd_a, odd_b);
  EXPECT_LE(relative_error(device.read(odd_out), expected), tolerance(dtype()));
  const std::string slow = device->slow_products(), name = dtype_name(dtype());
  EXPECT_NE(slow.find("2 x [17,23]x[23,19] " + name + " and " + name), std::string::npos) << slow;
  EXPECT_NE(slow.find("cuBLASLt has no algorithm"), std::string::npos) << slow;
}

// A product whose result was wrong gets one algorithm after another, then the plain kernel; others keep theirs.
TEST_P(GpuMatmul, DistrustedAlgorithms) {
  TestDevice device(backend());
  const Case c = {.m = 16, .n = 64, .k = 32};
  const Tensor a = device.random(1, dtype(), {c.m, c.k}), b = device.random(2, dtype(), {c.k, c.n});
  const Tensor out = device.poisoned(dtype(), {c.m, c.n}), other = device.poisoned(dtype(), {8, c.n});
  const Values expected = reference(c, device.read(a), device.read(b), {}, {});
  std::vector<std::string> taken;
  do {
    device->matmul(out, a, b);
    EXPECT_LE(relative_error(device.read(out), expected), tolerance(dtype()));
    taken.push_back(device->distrust("matmul"));
  } while (!taken.back().empty() && taken.size() < 20);
  ASSERT_GE(taken.size(), 2u);
  EXPECT_EQ(taken.back(), "") << "nothing is left behind the plain kernel";
  EXPECT_EQ(taken[taken.size() - 2], "the plain kernel");
  for (size_t i = 0; i + 2 < taken.size(); ++i) EXPECT_EQ(taken[i], "another algorithm of cuBLASLt");
  EXPECT_NE(device->slow_products().find("cuBLASLt's results are wrong"), std::string::npos);
  const std::string before = device->slow_products();
  device->matmul(other, a.slice(0, 8), b);
  EXPECT_EQ(device->slow_products(), before);
}

// ---- mixtures of dtypes

class MixedMatmul : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, MixedMatmul, ::testing::ValuesIn(backend_names()));

TEST_P(MixedMatmul, EveryMixOfDTypes) {
  TestDevice device(GetParam());
  for (int mix = 1; mix < 7; ++mix) {
    auto pick = [&](int bit) { return (mix >> bit) & 1 ? DType::kBF16 : DType::kF32; };
    const DTypes dtypes = {pick(0), pick(1), pick(2)};
    for (const bool accumulate : {false, true}) {
      check(device, {.m = 35, .n = 43, .k = 395, .accumulate = accumulate, .bias = true}, dtypes);
      check(device, {.m = 1, .n = 43, .k = 31, .transpose_b = true, .accumulate = accumulate}, dtypes, 3);
      check(device, {.m = 21, .n = 5, .k = 31, .transpose_a = true, .accumulate = accumulate}, dtypes, 2);
    }
  }
}

// Copies that do not fit the workspace at once: of an operand, then of the result.
TEST_P(MixedMatmul, InPieces) {
  TestDevice device(GetParam());
  check(device, {.m = 8, .n = 8192, .k = 1600, .bias = true}, {DType::kF32, DType::kBF16, DType::kF32});
  check(device, {.m = 2568, .n = 2504, .k = 8, .accumulate = true}, {DType::kBF16, DType::kF32, DType::kF32});
}

// Of bf16 operands, whatever else is tested.
TEST_P(MixedMatmul, MeasuresItsPeak) {
  TestDevice device(GetParam());
  EXPECT_GT(device->measure_peak_flops(), 1e8);
}

// ---- bias_backward

class BiasBackward : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(BiasBackward);

TEST_P(BiasBackward, SumsOverRows) {
  TestDevice device(backend());
  for (const bool accumulate : {false, true}) {
    for (const int64_t rows : {1, 2, 19, 1100}) {
      for (const int64_t cols : row_lengths(backend(), {1, 80, 301})) {
        const Tensor dout =
            device.random(1, dtype(), {rows, cols}, 1, rows == 19 ? row_length(backend(), cols + 5) : 0);
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
    const int64_t cols = row_length(backend(), 301);
    const Tensor dbias = device.poisoned(dtype(), {cols});
    device->bias_backward(dbias, device.random(1, dtype(), {1033, cols}), false);
    return device.bits(dbias);
  });
}

}  // namespace
