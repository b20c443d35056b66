// test_factored_moment.cpp: the factored second moment in pieces, for a gradient that is never whole: against float64,
// and against the one that sees the whole gradient.
#include <cmath>

#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

constexpr float kEps1 = 1e-3f;

StepScalars scalars_of(float beta2, uint32_t gate = 1) {
  StepScalars scalars;
  scalars.beta2 = beta2;
  scalars.gate = gate;
  return scalars;
}

class FactoredPieces : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(FactoredPieces);

struct Sums {
  Values row_means, col_sums;
};

Sums reference_squares(const Values& g, int64_t rows, int64_t cols) {
  Sums sums = {Values(static_cast<size_t>(rows)), Values(static_cast<size_t>(cols))};
  for (size_t i = 0; i < sums.row_means.size(); ++i) {
    for (size_t j = 0; j < sums.col_sums.size(); ++j) {
      const double x = g[i * sums.col_sums.size() + j], square = x * x + static_cast<double>(kEps1);
      sums.row_means[i] += square / static_cast<double>(cols);
      sums.col_sums[j] += square;
    }
  }
  return sums;
}

// Pieces of `step` rows each.
void add_pieces(TestDevice& device, const Tensor& row_squares, const Tensor& col_squares, const Tensor& g,
                int64_t step) {
  for (int64_t begin = 0; begin < g.rows(); begin += step) {
    const int64_t rows = std::min(step, g.rows() - begin);
    device->factored_squares(row_squares.slice(begin, rows), col_squares, g.slice(begin, rows), kEps1, begin > 0);
  }
}

TEST_P(FactoredPieces, SquaresOfRows) {
  for (auto [n, m] : {std::pair<int64_t, int64_t>{1, 1}, {3, 500}, {37, 83}, {700, 3}, {515, 257}}) {
    for (int64_t pitch : {int64_t{0}, m + 1, (m + 15) / 8 * 8}) {
      for (int64_t step : {n, (n + 1) / 2, (n + 6) / 7}) {
        TestDevice device(backend());
        const Tensor g = device.random(1, dtype(), {n, m}, 1, pitch);
        const Sums expected = reference_squares(device.read(g), n, m);
        const Tensor rows = device.poisoned(DType::kF32, {n}), cols = device.poisoned(DType::kF32, {m});
        add_pieces(device, rows, cols, g, step);
        EXPECT_LE(relative_error(device.read(rows), expected.row_means), 2e-6) << n << " x " << m << " by " << step;
        EXPECT_LE(relative_error(device.read(cols), expected.col_sums), 2e-6) << n << " x " << m << " by " << step;
      }
    }
  }
}

TEST_P(FactoredPieces, ScalesFromMeansAndSums) {
  const float beta2 = 0.7f;
  const double beta = static_cast<double>(beta2);
  for (auto [n, m] : {std::pair<int64_t, int64_t>{1, 1}, {3, 500}, {700, 3}, {515, 1111}}) {
    TestDevice device(backend());
    const auto positive = [&](uint32_t seed, int64_t count) {
      Values x = device.read(device.random(seed, DType::kF32, {count}));
      for (double& value : x) value = static_cast<double>(static_cast<float>(value * value + 0.01));
      return x;
    };
    Values row = positive(1, n), col = positive(2, m);
    const Values row_mean = positive(3, n), col_sum = positive(4, m);
    const Tensor row_state = device.upload(row, DType::kF32, {n}), col_state = device.upload(col, DType::kF32, {m});
    const Tensor row_scale = device.upload(row_mean, DType::kF32, {n});
    const Tensor col_scale = device.upload(col_sum, DType::kF32, {m});
    DeviceValue<StepScalars> scalars(device, scalars_of(beta2, 0));
    device->factored_scales(row_state, col_state, row_scale, col_scale, scalars.data());
    EXPECT_EQ(device.read(row_state), row);
    EXPECT_EQ(device.read(col_state), col);
    scalars.set(scalars_of(beta2));
    device->factored_scales(row_state, col_state, row_scale, col_scale, scalars.data());
    double mean = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      row[i] = beta * row[i] + (1 - beta) * row_mean[i];
      mean += row[i] / static_cast<double>(n);
    }
    for (size_t j = 0; j < col.size(); ++j) col[j] = beta * col[j] + (1 - beta) * col_sum[j] / static_cast<double>(n);
    EXPECT_LE(relative_error(device.read(row_state), row), 1e-6);
    EXPECT_LE(relative_error(device.read(col_state), col), 1e-6);
    for (double& x : row) x = 1 / std::sqrt(x / mean);
    for (double& x : col) x = 1 / std::sqrt(x);
    EXPECT_LE(relative_error(device.read(row_scale), row), 1e-6);
    EXPECT_LE(relative_error(device.read(col_scale), col), 1e-6);
  }
}

TEST_P(FactoredPieces, AreTheWhole) {
  for (auto [n, m, step] : {std::tuple<int64_t, int64_t, int64_t>{96, 256, 16}, {513, 300, 100}, {40, 1025, 7}}) {
    TestDevice device(backend());
    const Tensor g = device.random(1, dtype(), {n, m});
    const DeviceValue<StepScalars> scalars(device, scalars_of(0.8f));
    Values whole, pieces;
    for (Values* values : {&whole, &pieces}) {
      const Tensor row_state = device.upload(Values(static_cast<size_t>(n), 0.5), DType::kF32, {n});
      const Tensor col_state = device.upload(Values(static_cast<size_t>(m), 0.5), DType::kF32, {m});
      const Tensor row_scale = device.poisoned(DType::kF32, {n}), col_scale = device.poisoned(DType::kF32, {m});
      for (int repeat = 0; repeat < 2; ++repeat) {
        if (values == &whole) {
          device->factored_second_moment(row_state, col_state, row_scale, col_scale, g, kEps1, scalars.data());
        } else {
          add_pieces(device, row_scale, col_scale, g, step);
          device->factored_scales(row_state, col_state, row_scale, col_scale, scalars.data());
        }
      }
      for (const Tensor& t : {row_state, col_state, row_scale, col_scale})
        for (double x : device.read(t)) values->push_back(x);
    }
    EXPECT_LE(relative_error(pieces, whole), 1e-6) << n << " x " << m;
  }
}

TEST_P(FactoredPieces, AreIndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const Tensor g = device.random(1, dtype(), {333, 222});
    const Tensor rows = device.poisoned(DType::kF32, {333}), cols = device.poisoned(DType::kF32, {222});
    add_pieces(device, rows, cols, g, 100);
    std::vector<uint8_t> bits = device.bits(rows);
    append_bits(device, bits, cols);
    return bits;
  });
}

class GpuFactoredPieces : public OperationTest {};
INSTANTIATE_GPU_TESTS(GpuFactoredPieces, DType::kF32, DType::kBF16);

// A workspace too small for a whole matrix changes nothing: its columns are done in several ranges.
TEST_P(GpuFactoredPieces, InRanges) {
  const int64_t n = 300, m = 2000;
  std::vector<uint8_t> expected;
  for (bool small : {false, true}) {
    TestDevice device(backend());
    const Tensor workspace = device.poisoned(DType::kF32, {8192});
    if (small) device->set_workspace(workspace.data, workspace.bytes());
    const Tensor g = device.random(1, dtype(), {n, m});
    const Tensor rows = device.poisoned(DType::kF32, {n}), cols = device.poisoned(DType::kF32, {m});
    add_pieces(device, rows, cols, g, 200);
    std::vector<uint8_t> bits = device.bits(rows);
    append_bits(device, bits, cols);
    if (!small) expected = bits;
    EXPECT_TRUE(bits == expected);
    device->fill(workspace.data, 0xff, workspace.bytes());
  }
}

}  // namespace
