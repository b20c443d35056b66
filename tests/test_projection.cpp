// test_projection.cpp: random projections: their entries, and what they do to a gradient on average.
#include "flora/projection.h"

#include <gtest/gtest.h>

#include <cmath>

#include "flora/optimizers.h"
#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

const bool kProducts = with_products();

constexpr RandomKey kKey{.seed = 21, .purpose = RandomPurpose::kProjection, .tensor = 77};

// [rows_a, cols_a] times [cols_a, cols_b] in float64; `transpose` for b given as [cols_b, cols_a].
Values product(const Values& a, const Values& b, size_t rows, size_t inner, size_t cols, bool transpose) {
  Values out(rows * cols, 0);
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < cols; ++j)
      for (size_t k = 0; k < inner; ++k)
        out[i * cols + j] += a[i * inner + k] * b[transpose ? j * inner + k : k * cols + j];
  return out;
}

Values identity(size_t n) {
  Values out(n * n, 0);
  for (size_t i = 0; i < n; ++i) out[i * n + i] = 1;
  return out;
}

Parameter matrix(int64_t rows, int64_t cols) {
  Parameter p;
  p.name = "w";
  p.rows = p.padded_rows = rows;
  p.cols = cols;
  p.matrix = true;
  return p;
}

class Projection : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(Projection);

TEST_P(Projection, GaussianEntriesAreTheSpecifiedNumbers) {
  TestDevice device(backend());
  const DeviceValue<uint32_t> index(device, 6);
  for (auto [r, d] : {std::pair<int64_t, int64_t>{1, 1}, {4, 13}, {33, 101}, {64, 768}}) {
    const Tensor p = device.poisoned(dtype(), {r, d});
    device->generate_projection(p, ProjectionKind::kGaussian, kKey, index.data());
    Values expected;
    for (int64_t i = 0; i < r * d; ++i) {
      const PhiloxWords words = philox_block(kKey, 6, static_cast<uint64_t>(i / 4));
      float pair[2];
      normal_pair(words.w[i % 4 / 2 * 2], words.w[i % 4 / 2 * 2 + 1], pair[0], pair[1]);
      expected.push_back(pair[i % 2] / std::sqrt(static_cast<double>(r)));
    }
    EXPECT_LE(relative_error(device.read(p), expected), dtype() == DType::kF32 ? 1e-6 : 3e-3);
  }
}

TEST_P(Projection, SignsAreTheSpecifiedBits) {
  TestDevice device(backend());
  const DeviceValue<uint32_t> index(device, 2);
  for (auto [r, d] : {std::pair<int64_t, int64_t>{1, 1}, {3, 129}, {16, 1000}}) {
    const Tensor p = device.poisoned(dtype(), {r, d});
    device->generate_projection(p, ProjectionKind::kRademacher, kKey, index.data());
    Values expected;
    for (uint64_t i = 0; i < static_cast<uint64_t>(r * d); ++i) {
      const PhiloxWords words = philox_block(kKey, 2, i / 128);
      const bool plus = (words.w[i % 128 / 32] >> (i % 32)) & 1;
      expected.push_back((plus ? 1 : -1) / std::sqrt(static_cast<double>(r)));
    }
    EXPECT_LE(relative_error(device.read(p), expected), dtype() == DType::kF32 ? 1e-7 : 4e-3);
  }
}

// Rows of the cosine transform, each at most once, up to the sign of a column.
TEST_P(Projection, CosineRowsAreThoseOfTheTransform) {
  TestDevice device(backend());
  const DeviceValue<uint32_t> index(device, 5);
  const bool fp32 = dtype() == DType::kF32;
  for (auto [r, d] : {std::pair<int64_t, int64_t>{1, 1}, {3, 3}, {3, 7}, {13, 13}, {31, 1000}, {64, 4097}}) {
    const Tensor p = device.poisoned(dtype(), {r, d});
    device->generate_projection(p, ProjectionKind::kCosine, kKey, index.data());
    const Values values = device.read(p);
    const size_t rows = static_cast<size_t>(r), cols = static_cast<size_t>(d);
    std::vector<bool> seen(cols, false);
    for (size_t k = 0; k < rows; ++k) {
      // The frequency whose row has the same magnitudes.
      double best = 1e9;
      size_t frequency = 0;
      for (size_t f = 0; f < cols; ++f) {
        double distance = 0;
        for (size_t j = 0; j < cols && distance < best; ++j) {
          const double angle =
              M_PI * static_cast<double>(f) * static_cast<double>(2 * j + 1) / (2.0 * static_cast<double>(d));
          const double entry = std::sqrt((f == 0 ? 1.0 : 2.0) / static_cast<double>(d)) * std::cos(angle);
          distance = std::max(distance, std::abs(std::abs(values[k * cols + j]) - std::abs(entry)));
        }
        if (distance < best) best = distance, frequency = f;
      }
      EXPECT_LE(best * std::sqrt(static_cast<double>(d)), fp32 ? 1e-6 : 6e-3) << r << "x" << d;
      EXPECT_FALSE(seen[frequency]) << "row " << k << " repeats frequency " << frequency;
      seen[frequency] = true;
    }
    EXPECT_LE(relative_error(product(values, values, rows, cols, rows, true), identity(rows)), fp32 ? 1e-6 : 1e-2);
  }
}

TEST_P(Projection, CosineProjectionsOfOtherIndicesAreOthers) {
  TestDevice device(backend());
  const auto of = [&](uint32_t number) {
    const DeviceValue<uint32_t> index(device, number);
    const Tensor p = device.poisoned(dtype(), {8, 64});
    device->generate_projection(p, ProjectionKind::kCosine, kKey, index.data());
    return device.read(p);
  };
  // The overlap of two random subspaces: ||P Q^T||^2 = r^2 / d = 1 on average.
  double overlap = 0;
  for (uint32_t i = 0; i < 20; ++i) {
    const Values p = of(2 * i), q = of(2 * i + 1);
    for (double x : product(p, q, 8, 64, 8, true)) overlap += x * x / 20;
  }
  EXPECT_GT(overlap, 0.7);
  EXPECT_LT(overlap, 1.4);
}

TEST_P(Projection, IsIndependentOfThreads) {
  for (ProjectionKind kind : {ProjectionKind::kGaussian, ProjectionKind::kRademacher, ProjectionKind::kCosine}) {
    expect_independent_of_threads(backend(), [&](TestDevice& device) {
      const DeviceValue<uint32_t> index(device, 2);
      const Tensor p = device.poisoned(dtype(), {70, 301});
      device->generate_projection(p, kind, kKey, index.data());
      return device.bits(p);
    });
  }
}

// ---- compression

TEST_P(Projection, DownUpAndTransferAreTheirFormulas) {
  for (auto [n, m] : {std::pair<int64_t, int64_t>{20, 33}, {33, 20}, {17, 17}}) {
    TestDevice device(backend());
    const int64_t r = 5;
    const Compression shape(matrix(n, m), r);
    const size_t rows = static_cast<size_t>(n), cols = static_cast<size_t>(m), rank = 5;
    const size_t dimension = static_cast<size_t>(shape.dimension());
    const Tensor g = device.random(1, dtype(), {n, m});
    const Tensor p = device.random(2, dtype(), {r, shape.dimension()}),
                 next = device.random(3, dtype(), {r, shape.dimension()});
    const Tensor down = device.poisoned(DType::kF32, {shape.compressed_rows(), shape.compressed_cols()});
    project_down(device.backend(), down, g, p, shape, false);
    const Values G = device.read(g), P = device.read(p), N = device.read(next);
    const auto down_of = [&](const Values& x, const Values& by) {
      return shape.wide() ? product(by, x, rank, rows, cols, false) : product(x, by, rows, cols, rank, true);
    };
    const auto up_of = [&](const Values& x, const Values& by) {
      Values transposed(by.size());
      for (size_t i = 0; i < rank; ++i)
        for (size_t j = 0; j < dimension; ++j) transposed[j * rank + i] = by[i * dimension + j];
      return shape.wide() ? product(transposed, x, rows, rank, cols, false) : product(x, by, rows, rank, cols, false);
    };
    const Values M = down_of(G, P);
    EXPECT_LE(relative_error(device.read(down), M), 1e-5);

    const Tensor up = device.upload(Values(rows * cols, 2.0), dtype(), {n, m});
    project_up(device.backend(), up, down, p, shape, 0.5f, true);
    Values expected = up_of(M, P);
    for (double& x : expected) x = 2 + 0.5 * x;
    EXPECT_LE(relative_error(device.read(up), expected), tolerance(dtype()));

    const Tensor moved = device.poisoned(DType::kF32, {shape.compressed_rows(), shape.compressed_cols()});
    transfer(device.backend(), moved, down, p, next, device.poisoned(DType::kF32, {r, r}), shape);
    EXPECT_LE(relative_error(device.read(moved), down_of(up_of(M, P), N)), 1e-5);
  }
}

class CompressionTest : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, CompressionTest, ::testing::ValuesIn(backend_names()));

// E[up(down(G))] = G for Gaussian and Rademacher projections; the error of the mean of k projections falls as
// sqrt(d / (r k)). For orthonormal rows the mean is (r / d) G.
TEST_P(CompressionTest, IsUnbiased) {
  TestDevice device(GetParam());
  const int64_t n = 24, m = 40, r = 8;
  const Compression shape(matrix(n, m), r);
  const Tensor g = device.random(1, DType::kF32, {n, m});
  const Tensor p = device.poisoned(DType::kF32, {r, n}), down = device.poisoned(DType::kF32, {r, m});
  for (ProjectionKind kind : {ProjectionKind::kGaussian, ProjectionKind::kRademacher, ProjectionKind::kCosine}) {
    const uint32_t count = 600;
    DeviceValue<uint32_t> number(device);
    const Tensor sum = device.upload(Values(n * m, 0.0), DType::kF32, {n, m});
    for (uint32_t index = 0; index < count; ++index) {
      number.set(index);
      device->generate_projection(p, kind, kKey, number.data());
      project_down(device.backend(), down, g, p, shape, false);
      project_up(device.backend(), sum, down, p, shape, 1.0f / static_cast<float>(count), true);
    }
    Values expected = device.read(g);
    const double shrink = has_orthonormal_rows(kind) ? static_cast<double>(r) / n : 1.0;
    for (double& x : expected) x *= shrink;
    const double sampling_error = std::sqrt(static_cast<double>(n) / (r * count));
    EXPECT_LE(relative_error(device.read(sum), expected), 1.5 * sampling_error);
    if (!has_orthonormal_rows(kind)) {
      EXPECT_GE(relative_error(device.read(sum), expected), 0.5 * sampling_error);
    }
  }
}

TEST(IsCompressed, FollowsRankRatioAndKind) {
  const auto gaussian = ProjectionKind::kGaussian, cosine = ProjectionKind::kCosine;
  EXPECT_TRUE(is_compressed(matrix(64, 256), 64, false, gaussian));
  EXPECT_TRUE(is_compressed(matrix(256, 64), 64, false, gaussian));
  EXPECT_FALSE(is_compressed(matrix(64, 257), 64, false, gaussian));  // ratio above 4
  EXPECT_TRUE(is_compressed(matrix(64, 257), 64, true, gaussian));
  EXPECT_FALSE(is_compressed(matrix(63, 64), 64, false, gaussian));  // rank above the smaller dimension
  EXPECT_FALSE(is_compressed(matrix(64, 64), 0, false, gaussian));
  EXPECT_FALSE(is_compressed(matrix(64, 64), 64, false, cosine));
  EXPECT_TRUE(is_compressed(matrix(65, 64), 63, false, cosine));
  EXPECT_TRUE(is_compressed(matrix(65, 65), 64, false, cosine));
  Parameter vector;
  vector.cols = 100;
  EXPECT_FALSE(is_compressed(vector, 1, true, gaussian));
}

}  // namespace
