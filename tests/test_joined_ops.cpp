// Operations that do what several others do, in fewer passes and launches: they leave the same bits, and the sums of
// squares that come along are those of the numbers.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

class JoinedOps : public OperationTest {
 protected:
  static constexpr RandomKey kKey{.seed = 3, .purpose = RandomPurpose::kWeightRounding, .tensor = 9};

  static StepScalars scalars(uint32_t gate = 1) {
    StepScalars s;
    s.lr = 0.01f, s.beta2 = 0.9f, s.step = 4, s.gate = gate;
    s.bias_correction1 = 0.3f, s.bias_correction2 = 0.2f;
    s.projection_index = 2;
    return s;
  }

  // As a state of a run: what a second moment is is not negative.
  static Tensor state(TestDevice& device, uint32_t seed, DType type, std::initializer_list<int64_t> shape) {
    Tensor values = device.random(seed, DType::kF32, shape, 0.1);
    Values positive = device.read(values);
    for (double& x : positive) x = std::abs(x);
    device.write(values, positive);
    if (type == DType::kF32) return values;
    const Tensor t = device.poisoned(type, shape);
    type == DType::kBF16 ? device->convert(t, values) : device->quantize(t, values);
    return t;
  }

  static double squares_of(const TestDevice& device, const Tensor& t) {
    double sum = 0;
    for (double x : device.read(t)) sum += x * x;
    return sum;
  }

  static void expect_squares(const TestDevice& device, const Tensor& out, double expected) {
    EXPECT_NEAR(device.read(out)[0] / expected, 1, 2e-6);
  }
};
INSTANTIATE_OPERATION_TESTS(JoinedOps);

std::vector<uint8_t> bits_of(const TestDevice& device, std::initializer_list<Tensor> tensors) {
  std::vector<uint8_t> bits;
  for (const Tensor& t : tensors)
    if (!t.empty()) append_bits(device, bits, t);
  return bits;
}

TEST_P(JoinedOps, SumsAndScalesOfSeveralTensors) {
  TestDevice device(backend());
  std::vector<Tensor> tensors, copies;
  const Tensor one = device.poisoned(DType::kF32, {1}), all = device.poisoned(DType::kF32, {1}),
               factor = device.upload({0.75}, DType::kF32, {1});
  uint32_t seed = 0;
  for (int64_t n : {1, 7, 24, 300, 8192, 8200, 20001, 5, 64, 640, 72, 80, 88, 96, 104, 112, 120, 128}) {
    tensors.push_back(device.random(++seed, n == 300 ? DType::kF32 : dtype(), {n}));
    copies.push_back(device.random(seed, n == 300 ? DType::kF32 : dtype(), {n}));
    device->sum_squares(one, tensors.back(), seed > 1);
    device->scale(copies.back(), factor.as<float>());
  }
  device->sum_squares(all, tensors, false);
  EXPECT_EQ(device.bits(all), device.bits(one));
  device->sum_squares(all, tensors, true);
  EXPECT_NEAR(device.read(all)[0] / device.read(one)[0], 2, 1e-5);
  device->scale(tensors, factor.as<float>());
  for (size_t i = 0; i < tensors.size(); ++i) EXPECT_EQ(device.bits(tensors[i]), device.bits(copies[i])) << i;
}

TEST_P(JoinedOps, ScaledMomentumUpdate) {
  for (auto [rows, cols] : {std::pair<int64_t, int64_t>{1, 8}, {5, 7}, {40, 24}, {70, 304}, {130, 1000}}) {
    for (DType kind : {DType::kF32, DType::kBF16, DType::kI8}) {
      for (int parts = 0; parts < 4; ++parts) {
        TestDevice device(backend());
        const bool scaled = parts & 1, momentum = parts & 2;
        const DeviceValue<StepScalars> s(device, scalars());
        const Tensor row = scaled ? state(device, 5, DType::kF32, {rows}) : Tensor{},
                     col = scaled ? state(device, 6, DType::kF32, {cols}) : Tensor{};
        std::vector<uint8_t> bits[2];
        for (int joined = 0; joined < 2; ++joined) {
          const Tensor update = device.random(1, dtype(), {rows, cols}),
                       m = momentum ? state(device, 2, kind, {rows, cols}) : Tensor{},
                       squares = device.upload({0.5}, DType::kF32, {1});
          if (joined) {
            device->scaled_momentum_update(update, m, row, col, 0.9f, s.data(), {squares.as<float>(), true});
          } else {
            if (scaled) device->scale_rows_cols({update, update, row, col, 1.0f});
            if (momentum) device->momentum_update(update, m, 0.9f, s.data());
            device->sum_squares(squares, update, true);
          }
          bits[joined] = bits_of(device, {update, m, squares});
        }
        EXPECT_EQ(bits[0], bits[1]) << rows << "x" << cols << " " << dtype_name(kind) << " " << parts;
      }
    }
  }
}

// So many elements that the partial sums of a sum are made of several tiles.
TEST_P(JoinedOps, ScaledMomentumUpdateOfManyTiles) {
  TestDevice device(backend());
  const int64_t tile = dtype() == DType::kF32 ? 4096 : 8192, rows = 1100, cols = tile;
  const DeviceValue<StepScalars> s(device, scalars());
  const Tensor update = device.poisoned(dtype(), {rows, cols}), again = device.poisoned(dtype(), {rows, cols});
  for (const Tensor& t : {update, again}) device->fill_constant(t, 0.7f);  // the scales are random
  const Tensor row = state(device, 5, DType::kF32, {rows}), col = state(device, 6, DType::kF32, {cols}),
               squares = device.poisoned(DType::kF32, {2});
  device->scaled_momentum_update(update, {}, row, col, 0.9f, s.data(), {squares.as<float>(), false});
  device->scale_rows_cols({again, again, row, col, 1.0f});
  device->sum_squares(squares.slice(1, 1), again, false);
  EXPECT_TRUE(device.bits(update) == device.bits(again));
  EXPECT_EQ(device.bits(squares.slice(0, 1)), device.bits(squares.slice(1, 1)));
}

TEST_P(JoinedOps, UnfactoredUpdate) {
  for (DType weight_type : {DType::kF32, DType::kBF16}) {
    for (int variant = 0; variant < 8; ++variant) {
      TestDevice device(backend());
      const bool momentum = variant & 1, master = variant & 2, scale_parameter = variant & 4;
      const DeviceValue<StepScalars> s(device, scalars());
      std::vector<uint8_t> bits[2];
      Values norms[2];
      double expected = 0;
      for (int joined = 0; joined < 2; ++joined) {
        std::vector<ParameterUpdate> updates;
        uint32_t seed = 10;
        for (int64_t n : {24, 1, 3072, 20001, 8192}) {
          updates.push_back({.weight = device.random(++seed, weight_type, {n}),
                             .master = master ? device.random(seed, DType::kF32, {n}) : Tensor{},
                             .momentum = momentum ? state(device, ++seed, DType::kF32, {n}) : Tensor{},
                             .second_moment = state(device, ++seed, DType::kF32, {n}),
                             .grad = device.random(++seed, dtype(), {n}),
                             .weight_decay = n == 24 ? 0.1f : 0.0f,
                             .lr_scale = n == 24 ? 0.5f : 1.0f,
                             .key = kKey});
          updates.back().key.tensor = seed;
          if (joined == 0) expected += squares_of(device, updates.back().grad);
        }
        const Tensor norm = device.poisoned(DType::kF32, {1}), squares = device.poisoned(DType::kF32, {2});
        const UnfactoredOptions options = {.eps1 = 1e-3f,
                                           .beta1 = momentum ? 0.8f : 0.0f,
                                           .clip = variant == 1 ? 0.0f : 0.7f,
                                           .scale_parameter = scale_parameter};
        if (joined) {
          device->unfactored_update(updates, options, s.data(), {norm.as<float>(), false});
        } else {
          for (const ParameterUpdate& p : updates) {
            device->sum_squares(norm, p.grad, &p != updates.data());
            device->full_second_moment(p.grad, p.second_moment, options.eps1, s.data());
            if (momentum) device->momentum_update(p.grad, p.momentum, options.beta1, s.data());
            device->sum_squares(squares.slice(0, 1), p.grad, false);
            device->sum_squares(squares.slice(1, 1), master ? p.master : p.weight, false);
            device->apply_update(p.weight, p.master, p.grad,
                                 {.weight_decay = p.weight_decay,
                                  .lr_scale = p.lr_scale,
                                  .clip = options.clip,
                                  .scale_parameter = scale_parameter},
                                 squares.as<float>(), squares.as<float>() + 1, p.grad.elements(), p.key, s.data());
          }
        }
        for (const ParameterUpdate& p : updates) {
          const std::vector<uint8_t> more = bits_of(device, {p.weight, p.master, p.momentum, p.second_moment, p.grad});
          bits[joined].insert(bits[joined].end(), more.begin(), more.end());
        }
        append_bits(device, bits[joined], norm);
        expect_squares(device, norm, expected);
      }
      EXPECT_TRUE(bits[0] == bits[1]) << dtype_name(weight_type) << " " << variant;
    }
  }
}

TEST_P(JoinedOps, UpdatesOfSeveralParameters) {
  for (DType kind : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (bool adamw : {false, true}) {
      for (bool momentum : {false, true}) {
        TestDevice device(backend());
        const DeviceValue<StepScalars> s(device, scalars());
        std::vector<uint8_t> bits[2];
        for (int joined = 0; joined < 2; ++joined) {
          std::vector<ParameterUpdate> updates;
          uint32_t seed = 40;
          double expected = 0;
          for (int64_t n : {24, 1, 2048, 5000, 2049, 8, 16, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112}) {
            updates.push_back(
                {.weight = device.random(++seed, dtype(), {n}),
                 .master = n == 5000 ? device.random(seed, DType::kF32, {n}) : Tensor{},
                 .momentum = momentum ? state(device, ++seed, kind, {n}) : Tensor{},
                 .second_moment =
                     adamw ? state(device, ++seed, kind == DType::kI8 ? DType::kU8 : DType::kF32, {n}) : Tensor{},
                 .grad = device.random(++seed, n == 2049 ? DType::kF32 : dtype(), {n}),
                 .weight_decay = n == 24 ? 0.1f : 0.0f,
                 .lr_scale = n == 5000 ? 0.5f : 1.0f,
                 .key = kKey});
            updates.back().key.tensor = seed;
            expected += squares_of(device, updates.back().grad);
          }
          const Tensor norm = device.upload({1}, DType::kF32, {1});
          const SquaresTarget target{norm.as<float>(), false};
          if (joined && adamw) device->adamw_update(updates, {}, s.data(), target);
          if (joined && !adamw) device->sgd_update(updates, 0.9f, s.data(), target);
          for (const ParameterUpdate& p : updates) {
            if (!joined && adamw) device->adamw_update(p, {}, s.data());
            if (!joined && !adamw) device->sgd_update(p, 0.9f, s.data());
            const std::vector<uint8_t> more = bits_of(device, {p.weight, p.master, p.momentum, p.second_moment});
            bits[joined].insert(bits[joined].end(), more.begin(), more.end());
          }
          if (joined) expect_squares(device, norm, expected);
        }
        EXPECT_TRUE(bits[0] == bits[1]) << dtype_name(kind) << " " << adamw << momentum;
      }
    }
  }
}

TEST_P(JoinedOps, FactoredMomentWithProjection) {
  for (ProjectionKind kind : {ProjectionKind::kGaussian, ProjectionKind::kRademacher, ProjectionKind::kCosine}) {
    for (auto [rows, cols] : {std::pair<int64_t, int64_t>{24, 72}, {300, 40}, {71, 523}, {600, 300}}) {
      for (bool of_rows : {false, true}) {
        TestDevice device(backend());
        const int64_t rank = 6, dimension = of_rows ? rows : cols;
        const DeviceValue<StepScalars> s(device, scalars());
        const Tensor grad = device.random(1, dtype(), {rows, cols});
        std::vector<uint8_t> bits[2];
        for (int joined = 0; joined < 2; ++joined) {
          const Tensor row = state(device, 2, DType::kF32, {rows}), col = state(device, 3, DType::kF32, {cols}),
                       row_scale = device.poisoned(DType::kF32, {rows}),
                       col_scale = device.poisoned(DType::kF32, {cols}),
                       plain = device.poisoned(dtype(), {rank, dimension}),
                       scaled = device.poisoned(dtype(), {rank, dimension}),
                       norm = device.upload({2}, DType::kF32, {1});
          const ScaledProjection projection = {plain, scaled, of_rows, kind, kKey, &s.data()->projection_index};
          if (joined) {
            device->factored_second_moment(row, col, row_scale, col_scale, grad, 1e-30f, s.data(),
                                           {norm.as<float>(), true}, &projection);
            expect_squares(device, norm, 2 + squares_of(device, grad));
          } else {
            device->factored_second_moment(row, col, row_scale, col_scale, grad, 1e-30f, s.data());
            device->generate_projection(plain, kind, kKey, &s.data()->projection_index);
            device->scale_rows_cols({scaled, plain, {}, of_rows ? row_scale : col_scale, 1.0f});
          }
          bits[joined] = bits_of(device, {row, col, row_scale, col_scale, plain, scaled});
        }
        EXPECT_EQ(bits[0], bits[1]) << rows << "x" << cols << " " << of_rows;
      }
    }
  }
}

// The norm of a gradient is known when a gate is closed, and nothing else happens.
TEST_P(JoinedOps, ClosedGate) {
  TestDevice device(backend());
  const DeviceValue<StepScalars> s(device, scalars(0));
  const Tensor grad = device.random(1, dtype(), {40, 24}), row = state(device, 2, DType::kF32, {40}),
               col = state(device, 3, DType::kF32, {24}), weight = device.random(4, dtype(), {40, 24}),
               moment = state(device, 5, DType::kF32, {40, 24}), momentum = state(device, 6, DType::kF32, {40, 24}),
               row_scale = device.upload(Values(40, 1), DType::kF32, {40}),
               col_scale = device.upload(Values(24, 1), DType::kF32, {24}), norm = device.poisoned(DType::kF32, {4});
  const std::vector<uint8_t> before = bits_of(device, {row, col, weight, moment, momentum});
  const double expected = squares_of(device, grad);
  const ParameterUpdate update = {
      .weight = weight, .momentum = momentum, .second_moment = moment, .grad = grad, .key = kKey};
  const std::vector<ParameterUpdate> updates = {update};
  device->factored_second_moment(row, col, row_scale, col_scale, grad, 1e-30f, s.data(), {norm.as<float>(), false});
  device->adamw_update(updates, {}, s.data(), {norm.as<float>() + 1, false});
  device->sgd_update(updates, 0.9f, s.data(), {norm.as<float>() + 2, false});
  device->unfactored_update(updates, {.beta1 = 0.9f}, s.data(), {norm.as<float>() + 3, false});
  EXPECT_EQ(bits_of(device, {row, col, weight, moment, momentum}), before);
  for (int i = 0; i < 4; ++i) expect_squares(device, norm.slice(i, 1), expected);
}

TEST_P(JoinedOps, AverageWithScalesAndBesideAnUpdate) {
  for (DType kind : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (auto [rows, cols] : {std::pair<int64_t, int64_t>{5, 7}, {40, 24}, {300, 70}}) {
      for (bool of_rows : {false, true}) {
        TestDevice device(backend());
        const int64_t n = 40 * 24;
        const DeviceValue<StepScalars> s(device, scalars());
        const Tensor scale = state(device, 8, DType::kF32, {of_rows ? rows : cols}),
                     squares = device.upload({static_cast<double>(2 * n)}, DType::kF32, {1});
        std::vector<uint8_t> bits[2];
        for (int joined = 0; joined < 2; ++joined) {
          const Tensor m = state(device, 2, kind, {rows, cols}), in = device.random(3, DType::kF32, {rows, cols}),
                       weight = device.random(4, dtype(), {40, 24}), update = device.random(5, dtype(), {40, 24});
          const Tensor row = of_rows ? scale : Tensor{}, col = of_rows ? Tensor{} : scale;
          const MomentumAverage average = {.momentum = m, .in = in, .row_scale = row, .col_scale = col, .beta1 = 0.9f};
          if (joined) {
            device->apply_update(weight, {}, update, {}, squares.as<float>(), nullptr, n, kKey, s.data(), &average);
          } else {
            device->apply_update(weight, {}, update, {}, squares.as<float>(), nullptr, n, kKey, s.data());
            device->scale_rows_cols({in, in, row, col, 1.0f});
            device->ema({.momentum = m, .in = in, .beta1 = 0.9f}, s.data());
          }
          bits[joined] = bits_of(device, {m, weight});
        }
        EXPECT_EQ(bits[0], bits[1]) << rows << "x" << cols << " " << dtype_name(kind) << of_rows;
      }
    }
  }
}

TEST_P(JoinedOps, ScaleWithAnAddend) {
  for (DType type : {DType::kF32, DType::kBF16}) {
    for (auto [rows, cols] : {std::pair<int64_t, int64_t>{5, 7}, {40, 24}}) {
      TestDevice device(backend());
      const Tensor in = device.random(1, DType::kF32, {rows, cols}), added = device.random(2, type, {rows, cols}),
                   col = device.random(3, DType::kF32, {cols}), out = device.poisoned(dtype(), {rows, cols});
      device->scale_rows_cols({out, in, {}, col, -1.0f, added});
      device->scale_rows_cols({in, in, {}, col, -1.0f});
      Values sum = device.read(added);
      const Values scaled = device.read(in);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] = static_cast<float>(sum[i]) + static_cast<float>(scaled[i]);
      EXPECT_EQ(device.bits(out), device.bits(device.upload(sum, dtype(), {rows, cols})));
    }
  }
}

// A momentum of a rank that fills octets or not, beside a gradient of octets or not.
TEST_P(JoinedOps, ScaleBesideAnotherSum) {
  for (DType type : {DType::kF32, DType::kBF16}) {
    for (const int64_t cols : {7, 24}) {
      for (const int64_t more : {5, 40, 1100}) {
        TestDevice device(backend());
        const Tensor row = device.random(1, DType::kF32, {33}), col = device.random(2, DType::kF32, {more}),
                     in = device.random(3, DType::kF32, {9, more}), momentum = device.random(4, type, {9, more});
        std::vector<uint8_t> bits[2];
        for (int joined = 0; joined < 2; ++joined) {
          const Tensor gradient = device.random(5, dtype(), {33, cols}), out = device.poisoned(dtype(), {9, more});
          const ScaledSum sum = {gradient, gradient, row, {}, 0.7f}, other = {out, in, {}, col, -1.0f, momentum};
          device->scale_rows_cols(sum, joined ? &other : nullptr);
          if (!joined) device->scale_rows_cols(other);
          bits[joined] = bits_of(device, {gradient, out});
        }
        EXPECT_EQ(bits[0], bits[1]) << dtype_name(type) << " " << cols << " " << more;
      }
    }
  }
}

}  // namespace
