// test_optimizer_ops.cpp: the operations on moments and weights against float64 formulas, on odd sizes, in every
// combination of dtypes and options, with the gate open and closed.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

constexpr RandomKey kKey{.seed = 17, .purpose = RandomPurpose::kWeightRounding, .tensor = 5};
const int64_t kSizes[] = {1, 7, 256, 1000, 40001};
const DType kStates[] = {DType::kF32, DType::kBF16, DType::kI8};

// A state of any dtype that holds (about) `values`, and what it holds exactly.
Tensor make_state(TestDevice& device, DType dtype, const Values& values) {
  const int64_t count = static_cast<int64_t>(values.size());
  if (dtype != DType::kI8 && dtype != DType::kU8) return device.upload(values, dtype, {count});
  const Tensor t = device.poisoned(dtype, {count});
  device->quantize(t, device.upload(values, DType::kF32, {count}));
  return t;
}

Values state_values(TestDevice& device, const Tensor& t) {
  const Tensor wide = device.poisoned(DType::kF32, {t.elements()});
  device->dequantize(wide, t);
  return device.read(wide);
}

double state_tolerance(DType dtype) {
  if (dtype == DType::kF32) return 1e-6;
  return dtype == DType::kBF16 ? 5e-3 : 1.5e-2;
}

Values normal_values(TestDevice& device, uint32_t seed, int64_t count, double stddev = 1) {
  return device.read(device.random(seed, DType::kF32, {count}, stddev));
}

StepScalars scalars_of(float lr = 0.01f, float beta2 = 0.9f, uint32_t step = 3) {
  StepScalars s;
  s.lr = lr, s.beta2 = beta2, s.step = step;
  s.bias_correction1 = 0.3f, s.bias_correction2 = 0.2f;
  return s;
}

// The same behind a closed gate.
StepScalars closed(StepScalars s) {
  s.gate = 0;
  return s;
}

class OptimizerOps : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(OptimizerOps);

// ---- accumulate, clip_scale

TEST_P(OptimizerOps, AccumulateInFp32) {
  TestDevice device(backend());
  for (int64_t n : kSizes) {
    const Tensor sum = device.random(1, DType::kF32, {n}), in = device.random(2, dtype(), {n});
    Values expected = device.read(sum);
    const Values added = device.read(in);
    for (size_t i = 0; i < added.size(); ++i) expected[i] += added[i];
    const DeviceValue<uint32_t> counter(device, 4);
    device->accumulate(sum, in, kKey, counter.data());
    EXPECT_LE(relative_error(device.read(sum), expected), 1e-6);
  }
}

TEST_P(OptimizerOps, AccumulateInBf16RoundsWithTheSpecifiedNumbers) {
  TestDevice device(backend());
  for (uint64_t offset : {0, 3, 8, 1001}) {
    RandomKey key = kKey;
    key.offset = offset;
    const int64_t n = 3001;
    const Tensor sum = device.random(1, DType::kBF16, {n}), in = device.random(2, dtype(), {n}, 1e-2);
    const Values old = device.read(sum), added = device.read(in);
    const DeviceValue<uint32_t> counter(device, 9);
    device->accumulate(sum, in, key, counter.data());
    const Values actual = device.read(sum);
    for (uint64_t i = 0; i < static_cast<uint64_t>(n); ++i) {
      const float exact = static_cast<float>(old[i]) + static_cast<float>(added[i]);
      const uint32_t z = rounding_bits(philox_block(key, 9, (offset + i) / 8), offset + i);
      ASSERT_EQ(actual[i], static_cast<double>(to_float(round_stochastic(exact, z)))) << i;
    }
  }
}

TEST_P(OptimizerOps, AccumulateKeepsWhatIsNotFinite) {
  TestDevice device(backend());
  Values in(300, 1.0);
  in[3] = INFINITY, in[4] = -INFINITY, in[100] = NAN, in[299] = NAN;
  const DeviceValue<uint32_t> counter(device, 4);
  for (DType sum_dtype : {DType::kF32, DType::kBF16}) {
    const Tensor sum = device.upload(Values(300, 0.5), sum_dtype, {300});
    device->accumulate(sum, device.upload(in, dtype(), {300}), kKey, counter.data());
    const Values out = device.read(sum);
    for (size_t i = 0; i < in.size(); ++i) {
      if (std::isnan(in[i])) {
        ASSERT_TRUE(std::isnan(out[i])) << i;
      } else {
        ASSERT_EQ(out[i], in[i] + 0.5) << i;
      }
    }
  }
}

TEST_P(OptimizerOps, ClipScaleIsTheRatioOfNormsUpToOne) {
  TestDevice device(backend());
  for (double norm : {0.0, 0.5, 2.0, 1e4}) {
    const DeviceValue<StepScalars> scalars(device);
    const Tensor squares = device.upload({norm * norm}, DType::kF32, {1});
    device->clip_scale(scalars.data(), squares.as<float>(), 1.0f);
    EXPECT_NEAR(scalars.get().gradient_scale, std::min(1.0, 1 / (norm + 1e-6)), 1e-6);
  }
}

// ---- moments

TEST_P(OptimizerOps, FactoredSecondMoment) {
  const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {5, 7}, {33, 70}, {130, 257}, {2000, 3}, {3, 2000}};
  for (auto [n, m] : shapes) {
    for (float beta2 : {0.0f, 0.7f}) {
      TestDevice device(backend());
      const Tensor g = device.random(1, dtype(), {n, m});
      Values row = normal_values(device, 2, n), col = normal_values(device, 3, m);
      for (double& x : row) x *= x;
      for (double& x : col) x *= x;
      const Tensor row_state = device.upload(row, DType::kF32, {n}), col_state = device.upload(col, DType::kF32, {m});
      const Tensor row_scale = device.poisoned(DType::kF32, {n}), col_scale = device.poisoned(DType::kF32, {m});
      const float eps1 = 1e-3f;
      const Values grad = device.read(g);
      Values row_mean(row.size(), 0), col_mean(col.size(), 0);
      for (size_t i = 0; i < grad.size(); ++i) {
        const size_t r = i / static_cast<size_t>(m), c = i % static_cast<size_t>(m);
        row_mean[r] += (grad[i] * grad[i] + eps1) / static_cast<double>(m);
        col_mean[c] += (grad[i] * grad[i] + eps1) / static_cast<double>(n);
      }
      double mean = 0;
      for (size_t i = 0; i < row.size(); ++i) {
        row[i] = beta2 * row[i] + (1 - beta2) * row_mean[i];
        mean += row[i] / static_cast<double>(n);
      }
      for (size_t j = 0; j < col.size(); ++j) col[j] = beta2 * col[j] + (1 - beta2) * col_mean[j];
      DeviceValue<StepScalars> s(device, closed(scalars_of(0.01f, beta2)));
      const auto before = device.bits(row_state);
      device->factored_second_moment(row_state, col_state, row_scale, col_scale, g, eps1, s.data());
      EXPECT_EQ(device.bits(row_state), before);
      s.set(scalars_of(0.01f, beta2));
      device->factored_second_moment(row_state, col_state, row_scale, col_scale, g, eps1, s.data());
      // fp32 sums in an order that depends on how the compiler vectorises; a build that does not needs more than 1e-6.
      EXPECT_LE(relative_error(device.read(row_state), row), 5e-6);
      EXPECT_LE(relative_error(device.read(col_state), col), 5e-6);
      for (double& x : row) x = 1 / std::sqrt(x / mean);
      for (double& x : col) x = 1 / std::sqrt(x);
      EXPECT_LE(relative_error(device.read(row_scale), row), 5e-6);
      EXPECT_LE(relative_error(device.read(col_scale), col), 5e-6);
    }
  }
}

TEST_P(OptimizerOps, FullSecondMoment) {
  for (int64_t n : kSizes) {
    for (DType state : {DType::kF32, DType::kU8}) {
      TestDevice device(backend());
      Values v = normal_values(device, 4, n);
      for (double& x : v) x *= x;
      const Tensor moment = make_state(device, state, v), g = device.random(1, dtype(), {n});
      v = state_values(device, moment);
      const Values grad = device.read(g);
      DeviceValue<StepScalars> s(device, closed(scalars_of(0.01f, 0.8f)));
      const auto before = device.bits(moment);
      device->full_second_moment(g, moment, 1e-3f, s.data());
      EXPECT_EQ(device.bits(moment), before);
      s.set(scalars_of(0.01f, 0.8f));
      device->full_second_moment(g, moment, 1e-3f, s.data());
      Values u(grad.size());
      for (size_t i = 0; i < u.size(); ++i) {
        v[i] = 0.8 * v[i] + 0.2 * (grad[i] * grad[i] + 1e-3);
        u[i] = grad[i] / std::sqrt(v[i]);
      }
      EXPECT_LE(relative_error(device.read(g), u), tolerance(dtype()));
      EXPECT_LE(relative_error(state_values(device, moment), v), state == DType::kF32 ? 1e-6 : 1.5e-2);
    }
  }
}

TEST_P(OptimizerOps, ScaleRowsCols) {
  for (DType out_dtype : {DType::kF32, DType::kBF16}) {
    for (int scales = 0; scales < 4; ++scales) {
      for (int64_t pitch : {0, 100, 104}) {
        TestDevice device(backend());
        const int64_t n = 37, m = 83;
        const Tensor in = device.random(1, dtype(), {n, m}, 1, pitch), out = device.poisoned(out_dtype, {n, m}, pitch);
        const Tensor rows = scales & 1 ? device.random(2, DType::kF32, {n}) : Tensor{};
        const Tensor cols = scales & 2 ? device.random(3, DType::kF32, {m}) : Tensor{};
        Values expected = device.read(in);
        const Values r = rows ? device.read(rows) : Values(37, 1.0), c = cols ? device.read(cols) : Values(83, 1.0);
        for (size_t i = 0; i < expected.size(); ++i) expected[i] *= -0.3 * r[i / 83] * c[i % 83];
        device->scale_rows_cols({out, in, rows, cols, -0.3f});
        EXPECT_LE(relative_error(device.read(out), expected), tolerance(out_dtype));
        device->scale_rows_cols({in, in, rows, cols, -0.3f});
        EXPECT_LE(relative_error(device.read(in), expected), tolerance(dtype()));
      }
    }
  }
}

TEST_P(OptimizerOps, MomentumUpdateAndEma) {
  for (int64_t n : kSizes) {
    for (DType state : kStates) {
      TestDevice device(backend());
      const Tensor m1 = make_state(device, state, normal_values(device, 1, n));
      const Tensor m2 = make_state(device, state, normal_values(device, 1, n));
      const Tensor update = device.random(2, dtype(), {n});
      Values expected = state_values(device, m1);
      const Values u = device.read(update);
      DeviceValue<StepScalars> s(device, closed({}));
      const auto before = device.bits(m1);
      const MomentumAverage average = {.momentum = m2, .in = update, .beta1 = 0.9f};
      device->momentum_update(update, m1, 0.9f, s.data());
      device->ema(average, s.data());
      EXPECT_EQ(device.bits(m1), before);
      EXPECT_EQ(device.bits(m2), before);
      s.set({});
      device->ema(average, s.data());
      device->momentum_update(update, m1, 0.9f, s.data());
      for (size_t i = 0; i < u.size(); ++i) expected[i] = 0.9 * expected[i] + 0.1 * u[i];
      EXPECT_LE(relative_error(device.read(update), expected), tolerance(dtype()));
      EXPECT_LE(relative_error(state_values(device, m1), expected), state_tolerance(state));
      EXPECT_EQ(device.bits(m1), device.bits(m2));
    }
  }
}

// ---- weights

// What a weight of this kind must hold when the exact result is `expected`: fp32 to rounding, bf16 rounded with the
// numbers of kKey, or with a master copy to nearest.
void expect_weight(TestDevice& device, const Tensor& weight, const Tensor& master, const Values& expected,
                   uint32_t step) {
  if (master) {
    EXPECT_LE(relative_error(device.read(master), expected), 1e-6);
    const Values m = device.read(master), w = device.read(weight);
    for (size_t i = 0; i < m.size(); ++i)
      ASSERT_EQ(w[i], static_cast<double>(weight.dtype == DType::kF32
                                              ? static_cast<float>(m[i])
                                              : to_float(from_float<bf16>(static_cast<float>(m[i])))));
    return;
  }
  const Values actual = device.read(weight);
  if (weight.dtype == DType::kF32) {
    EXPECT_LE(relative_error(actual, expected), 1e-6);
    return;
  }
  int64_t different = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const uint32_t z = rounding_bits(philox_block(kKey, step, i / 8), i);
    different += actual[i] != static_cast<double>(to_float(round_stochastic(static_cast<float>(expected[i]), z)));
  }
  EXPECT_LE(different, 1 + static_cast<int64_t>(actual.size()) / 200);  // fp32 rounding before the rounding to bf16
}

// Runs `update` on a weight with and without a master copy, with the gate closed and then open.
template <typename Update, typename Formula>
void check_update(const std::string& backend, DType weight_dtype, int64_t n, Update&& update, Formula&& formula) {
  for (bool with_master : {false, true}) {
    TestDevice device(backend);
    const Tensor weight = device.random(8, weight_dtype, {n});
    const Tensor master = with_master ? device.upload(device.read(weight), DType::kF32, {n}) : Tensor{};
    const Values old = device.read(weight);
    DeviceValue<StepScalars> s(device, closed(scalars_of()));
    const auto before = device.bits(weight);
    update(device, weight, master, s);
    EXPECT_EQ(device.bits(weight), before);
    s.set(scalars_of());
    Values expected = update(device, weight, master, s);
    for (size_t i = 0; i < old.size(); ++i) expected[i] = formula(old[i], expected[i]);
    expect_weight(device, weight, master, expected, scalars_of().step);
  }
}

TEST_P(OptimizerOps, ApplyUpdate) {
  for (int64_t n : {1, 300, 20001}) {
    for (float clip : {0.0f, 0.5f, 100.0f}) {
      for (bool scale_parameter : {false, true}) {
        for (DType grad : {DType::kF32, DType::kBF16}) {
          double lr = 0.01, shrink = 1;
          check_update(
              backend(), dtype(), n,
              [&](TestDevice& device, Tensor weight, Tensor master, const DeviceValue<StepScalars>& s) {
                const Tensor update = device.random(9, grad, {n});
                const Tensor squares = device.poisoned(DType::kF32, {2});
                device->sum_squares(squares.slice(0, 1), update, false);
                device->sum_squares(squares.slice(1, 1), weight, false);
                const Values sums = device.read(squares);
                lr = 0.005 * (scale_parameter ? std::max(0.2, std::sqrt(sums[1] / static_cast<double>(n))) : 1);
                shrink = clip > 0 ? 1 / std::max(1.0, std::sqrt(sums[0] / static_cast<double>(n)) / clip) : 1;
                const ApplyOptions options{.weight_decay = 0.1f,
                                           .lr_scale = 0.5f,
                                           .clip = clip,
                                           .scale_parameter = scale_parameter,
                                           .eps2 = 0.2f};
                device->apply_update(weight, master, update, options, squares.as<float>(), squares.as<float>() + 1, n,
                                     kKey, s.data());
                return device.read(update);
              },
              [&](double w, double d) { return w - lr * (0.1 * w + shrink * d); });
        }
      }
    }
  }
}

TEST_P(OptimizerOps, AdamW) {
  for (int64_t n : {1, 300, 20001}) {
    for (DType state : kStates) {
      for (bool momentum : {true, false}) {
        check_update(
            backend(), dtype(), n,
            [&](TestDevice& device, Tensor weight, Tensor master, const DeviceValue<StepScalars>& s) {
              const Tensor g = device.random(9, dtype(), {n});
              Values v = normal_values(device, 4, n);
              for (double& x : v) x *= x;
              const Tensor m_state = momentum ? make_state(device, state, normal_values(device, 3, n)) : Tensor{};
              const Tensor v_state = make_state(device, state == DType::kI8 ? DType::kU8 : DType::kF32, v);
              Values m = momentum ? state_values(device, m_state) : Values(v.size(), 0);
              v = state_values(device, v_state);
              device->adamw_update({.weight = weight,
                                    .master = master,
                                    .momentum = m_state,
                                    .second_moment = v_state,
                                    .grad = g,
                                    .weight_decay = 0.1f,
                                    .lr_scale = 0.5f,
                                    .key = kKey},
                                   {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-3f}, s.data());
              const Values grad = device.read(g);
              Values step(grad.size());
              for (size_t i = 0; i < step.size(); ++i) {
                m[i] = momentum ? 0.9 * m[i] + 0.1 * grad[i] : grad[i];
                v[i] = 0.95 * v[i] + 0.05 * grad[i] * grad[i];
                step[i] = m[i] / 0.3 / (std::sqrt(v[i] / 0.2) + 1e-3);
              }
              if (s.get().gate == 1) {
                if (momentum) {
                  EXPECT_LE(relative_error(state_values(device, m_state), m), state_tolerance(state));
                }
                EXPECT_LE(relative_error(state_values(device, v_state), v), state == DType::kI8 ? 1.5e-2 : 1e-6);
              }
              return step;
            },
            [](double w, double step) { return w - 0.005 * (step + 0.1 * w); });
      }
    }
  }
}

TEST_P(OptimizerOps, Sgd) {
  for (int64_t n : {1, 300, 20001}) {
    for (DType state : kStates) {
      for (bool momentum : {true, false}) {
        check_update(
            backend(), dtype(), n,
            [&](TestDevice& device, Tensor weight, Tensor master, const DeviceValue<StepScalars>& s) {
              const Tensor g = device.random(9, dtype(), {n});
              const Tensor m = momentum ? make_state(device, state, normal_values(device, 3, n)) : Tensor{};
              Values step = device.read(g);
              if (momentum) {
                const Values old = state_values(device, m);
                for (size_t i = 0; i < step.size(); ++i) step[i] += 0.9 * old[i];
              }
              device->sgd_update({.weight = weight,
                                  .master = master,
                                  .momentum = m,
                                  .grad = g,
                                  .weight_decay = 0.1f,
                                  .lr_scale = 0.5f,
                                  .key = kKey},
                                 0.9f, s.data());
              if (momentum && s.get().gate == 1) {
                EXPECT_LE(relative_error(state_values(device, m), step), state_tolerance(state));
              }
              return step;
            },
            [](double w, double u) { return w - 0.005 * (0.1 * w + u); });
      }
    }
  }
}

// A thousand updates of a thousandth of a bf16 unit move the weights by one unit on average; rounding to nearest would
// leave them where they are.
class StochasticUpdates : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, StochasticUpdates, ::testing::ValuesIn(backend_names()));

TEST_P(StochasticUpdates, AreNotLostInBf16) {
  TestDevice device(GetParam());
  const int64_t n = 4096;
  const Tensor weight = device.upload(Values(n, 1.0), DType::kBF16, {n}),
               nearest = device.upload(Values(n, 1.0), DType::kBF16, {n});
  const double step_size = 0x1p-8 / 1000;
  DeviceValue<StepScalars> s(device);
  const Tensor g = device.upload(Values(n, step_size), DType::kF32, {n});
  for (uint32_t t = 1; t <= 1000; ++t) {
    s.set(scalars_of(1.0f, 0.9f, t));
    device->sgd_update({.weight = weight, .grad = g, .key = kKey}, 0.0f, s.data());
    Values w = device.read(nearest);
    for (double& x : w) x -= step_size;
    device.write(nearest, w);
  }
  double mean = 0;
  for (double w : device.read(weight)) mean += w / static_cast<double>(n);
  EXPECT_NEAR(mean, 1 - 0x1p-8, 0x1p-8 * 0.1);
  for (double w : device.read(nearest)) ASSERT_EQ(w, 1.0);
}

TEST_P(OptimizerOps, AreIndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const int64_t n = 700, m = 301;
    const Tensor g = device.random(1, dtype(), {n, m}), weight = device.random(2, dtype(), {n, m});
    const Tensor row = device.upload(Values(n, 0.5), DType::kF32, {n}),
                 col = device.upload(Values(m, 0.5), DType::kF32, {m});
    const Tensor row_scale = device.poisoned(DType::kF32, {n}), col_scale = device.poisoned(DType::kF32, {m});
    const Tensor momentum = make_state(device, DType::kI8, Values(n * m, 0.0)),
                 squares = device.poisoned(DType::kF32, {1});
    const DeviceValue<StepScalars> s(device, scalars_of());
    device->factored_second_moment(row, col, row_scale, col_scale, g, 1e-30f, s.data());
    device->scale_rows_cols({g, g, row_scale, col_scale, 1.0f});
    device->momentum_update(g, momentum, 0.9f, s.data());
    device->sum_squares(squares, g, false);
    device->apply_update(weight, {}, g, {}, squares.as<float>(), nullptr, n * m, kKey, s.data());
    std::vector<uint8_t> bits = device.bits(weight);
    for (const Tensor& t : {row, col, row_scale, col_scale, squares}) append_bits(device, bits, t);
    return bits;
  });
}

// States and scales that a factored second moment makes of g, from states of 0.5.
std::vector<uint8_t> second_moment_bits(TestDevice& device, const Tensor& g) {
  const int64_t n = g.rows(), m = g.cols();
  const Tensor row = device.upload(Values(n, 0.5), DType::kF32, {n}),
               col = device.upload(Values(m, 0.5), DType::kF32, {m});
  const Tensor row_scale = device.poisoned(DType::kF32, {n}), col_scale = device.poisoned(DType::kF32, {m});
  const DeviceValue<StepScalars> s(device, scalars_of());
  device->factored_second_moment(row, col, row_scale, col_scale, g, 1e-30f, s.data());
  std::vector<uint8_t> bits;
  for (const Tensor& t : {row, col, row_scale, col_scale}) append_bits(device, bits, t);
  return bits;
}

TEST_P(OptimizerOps, FactoredSecondMomentOfStridedRows) {
  TestDevice device(backend());
  const int64_t n = 70, m = 300;
  std::vector<uint8_t> expected;
  const Values values = device.read(device.random(1, dtype(), {n, m}));
  for (int64_t pitch : {0, 304, 333}) {
    const Tensor g = device.upload(values, dtype(), {n, m}, pitch);
    const std::vector<uint8_t> bits = second_moment_bits(device, g);
    if (pitch == 0) expected = bits;
    EXPECT_TRUE(bits == expected) << pitch;
  }
}

class GpuOptimizerOps : public OperationTest {};
INSTANTIATE_GPU_TESTS(GpuOptimizerOps, DType::kF32, DType::kBF16);

// A workspace too small for a whole matrix changes nothing: its columns are done in several ranges. (The CPU needs as
// many columns as its workspace is made for.) Nor does it change the squares behind a closed gate, or the states there.
TEST_P(GpuOptimizerOps, FactoredSecondMomentInRanges) {
  const int64_t n = 300, m = 2000;
  std::vector<uint8_t> expected;
  for (bool small : {false, true}) {
    TestDevice device(backend());
    const Tensor workspace = device.poisoned(DType::kF32, {8192});
    if (small) device->set_workspace(workspace.data, workspace.bytes());
    const Tensor g = device.random(1, dtype(), {n, m});
    std::vector<uint8_t> bits = second_moment_bits(device, g);
    const DeviceValue<StepScalars> s(device, closed(scalars_of()));
    const Tensor state[] = {device.random(2, DType::kF32, {n}), device.random(3, DType::kF32, {m})};
    const Tensor scale[] = {device.poisoned(DType::kF32, {n}), device.poisoned(DType::kF32, {m})};
    const Tensor squares = device.poisoned(DType::kF32, {1});
    device->factored_second_moment(state[0], state[1], scale[0], scale[1], g, 1e-30f, s.data(),
                                   {squares.as<float>(), false});
    for (const Tensor& t : {state[0], state[1], squares}) append_bits(device, bits, t);
    if (!small) expected = bits;
    EXPECT_TRUE(bits == expected);
    device->fill(workspace.data, 0xff, workspace.bytes());
  }
}

}  // namespace
