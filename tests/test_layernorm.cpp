// test_layernorm.cpp: LayerNorm forward, with its residual addition, and backward, against float64 formulas.
#include "tests/backends.h"

namespace {

struct Normalized {
  Values out, mean, rstd;
};

Normalized reference_forward(const Values& in, const Values& weight, const Values& bias) {
  const size_t channels = weight.size();
  Normalized result;
  for (size_t row = 0; row < in.size() / channels; ++row) {
    const double* x = &in[row * channels];
    double mean = 0, variance = 0;
    for (size_t j = 0; j < channels; ++j) mean += x[j] / static_cast<double>(channels);
    for (size_t j = 0; j < channels; ++j) variance += (x[j] - mean) * (x[j] - mean) / static_cast<double>(channels);
    const double rstd = 1 / std::sqrt(variance + 1e-5);
    for (size_t j = 0; j < channels; ++j) result.out.push_back((x[j] - mean) * rstd * weight[j] + bias[j]);
    result.mean.push_back(mean);
    result.rstd.push_back(rstd);
  }
  return result;
}

struct Gradients {
  Values in, weight, bias;
};

Gradients reference_backward(const Values& dout, const Values& in, const Values& weight) {
  const size_t channels = weight.size();
  const Normalized unit = reference_forward(in, Values(channels, 1.0), Values(channels, 0.0));
  Gradients result = {Values(in.size()), Values(channels), Values(channels)};
  for (size_t row = 0; row < in.size() / channels; ++row) {
    double mean_g = 0, mean_gn = 0;
    for (size_t j = 0; j < channels; ++j) {
      const size_t at = row * channels + j;
      result.weight[j] += dout[at] * unit.out[at];
      result.bias[j] += dout[at];
      mean_g += dout[at] * weight[j] / static_cast<double>(channels);
      mean_gn += dout[at] * weight[j] * unit.out[at] / static_cast<double>(channels);
    }
    for (size_t j = 0; j < channels; ++j) {
      const size_t at = row * channels + j;
      result.in[at] = unit.rstd[row] * (dout[at] * weight[j] - mean_g - unit.out[at] * mean_gn);
    }
  }
  return result;
}

// a + b in fp32, rounded once.
Tensor sum_of(TestDevice& device, const Tensor& a, const Tensor& b) {
  Values sum = device.read(a);
  const Values summand = device.read(b);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = static_cast<float>(sum[i]) + static_cast<float>(summand[i]);
  return device.upload(sum, a.dtype, {a.rows(), a.cols()});
}

class LayerNorm : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(LayerNorm);

TEST_P(LayerNorm, Forward) {
  for (const int64_t rows : {1, 5, 67}) {
    for (const int64_t channels : row_lengths(backend(), {2, 80, 391, 768})) {
      for (const DType weights : {DType::kF32, DType::kBF16}) {
        TestDevice device(backend());
        const Tensor in =
            device.random(1, dtype(), {rows, channels}, 2, rows == 5 ? row_length(backend(), channels + 7) : 0);
        const Tensor weight = device.random(2, weights, {channels}), bias = device.random(3, weights, {channels});
        const Tensor out = device.poisoned(dtype(), {rows, channels});
        const Tensor mean = device.poisoned(DType::kF32, {rows}), rstd = device.poisoned(DType::kF32, {rows});
        device->layernorm_forward(out, mean, rstd, in, weight, bias);
        const Normalized expected = reference_forward(device.read(in), device.read(weight), device.read(bias));
        EXPECT_LE(relative_error(device.read(out), expected.out), tolerance(dtype())) << rows << " x " << channels;
        EXPECT_LE(relative_error(device.read(mean), expected.mean), 1e-5);
        EXPECT_LE(relative_error(device.read(rstd), expected.rstd), 1e-5);
      }
    }
  }
}

// Models from small to large, each with other numbers per thread, and a length that does not fill the last vectors.
TEST_P(LayerNorm, EveryWidth) {
  for (const int64_t channels : row_lengths(backend(), {256, 512, 776, 1024, 1280, 1536, 1600, 2048, 2304, 3072, 4096,
                                                        4099, 5120, 8192, 8200, 12288, 12296, 16384})) {
    TestDevice device(backend());
    const int64_t rows = 5;
    const Tensor in = device.random(1, dtype(), {rows, channels}, 2),
                 dout = device.random(2, dtype(), {rows, channels});
    const Tensor weight = device.random(3, dtype(), {channels}), bias = device.random(4, dtype(), {channels});
    const Tensor out = device.poisoned(dtype(), {rows, channels}), din = device.random(5, dtype(), {rows, channels});
    const Tensor mean = device.poisoned(DType::kF32, {rows}), rstd = device.poisoned(DType::kF32, {rows});
    const Tensor dweight = device.poisoned(dtype(), {channels}), dbias = device.poisoned(dtype(), {channels});
    const Normalized forward = reference_forward(device.read(in), device.read(weight), device.read(bias));
    Gradients backward = reference_backward(device.read(dout), device.read(in), device.read(weight));
    const Values old = device.read(din);
    for (size_t i = 0; i < old.size(); ++i) backward.in[i] += old[i];
    device->layernorm_forward(out, mean, rstd, in, weight, bias);
    EXPECT_LE(relative_error(device.read(out), forward.out), tolerance(dtype())) << channels;
    EXPECT_LE(relative_error(device.read(mean), forward.mean), 1e-5) << channels;
    EXPECT_LE(relative_error(device.read(rstd), forward.rstd), 1e-5) << channels;
    device->layernorm_backward(din, dweight, dbias, false, dout, in, mean, rstd, weight);
    EXPECT_LE(relative_error(device.read(din), backward.in), tolerance(dtype())) << channels;
    EXPECT_LE(relative_error(device.read(dweight), backward.weight), tolerance(dtype())) << channels;
    EXPECT_LE(relative_error(device.read(dbias), backward.bias), tolerance(dtype())) << channels;

    const Tensor residual = device.poisoned(dtype(), {rows, channels});
    const Tensor again = device.poisoned(dtype(), {rows, channels});
    device->residual_layernorm_forward(residual, again, mean, rstd, in, dout, weight, bias);
    EXPECT_EQ(device.bits(residual), device.bits(sum_of(device, in, dout))) << channels;
    device->layernorm_forward(out, mean, rstd, residual, weight, bias);
    EXPECT_EQ(device.bits(again), device.bits(out)) << channels;
  }
}

// A row's bits depend on its numbers alone, not on where it is or which kernel the layout of the others asks for.
TEST_P(LayerNorm, SameBitsInEveryLayout) {
  for (const int64_t channels : {80, 768}) {
    const int64_t rows = 11;
    std::vector<std::vector<uint8_t>> results;
    for (const int64_t pitch : {channels, channels + 8, row_length(backend(), channels + 3)}) {
      TestDevice device(backend());
      const Tensor in = device.random(1, dtype(), {rows, channels}, 2, pitch);
      const Tensor weight = device.random(3, dtype(), {channels}), bias = device.random(4, dtype(), {channels});
      const Tensor mean = device.poisoned(DType::kF32, {rows}), rstd = device.poisoned(DType::kF32, {rows});
      const Tensor out = device.poisoned(dtype(), {rows, channels}, pitch);
      device->layernorm_forward(out, mean, rstd, in, weight, bias);
      results.push_back(device.bits(out));
      for (const Tensor& t : {mean, rstd}) {
        const std::vector<uint8_t> bits = device.bits(t);
        results.back().insert(results.back().end(), bits.begin(), bits.end());
      }
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

TEST_P(LayerNorm, ResidualIsBitIdenticalToAddThenLayerNorm) {
  for (const int64_t channels : row_lengths(backend(), {1, 80, 391, 1024})) {
    for (const bool in_place : {false, true}) {
      TestDevice device(backend());
      const int64_t rows = 37;
      const Tensor a = device.random(1, dtype(), {rows, channels}), b = device.random(2, dtype(), {rows, channels});
      const Tensor weight = device.random(3, dtype(), {channels}), bias = device.random(4, dtype(), {channels});
      auto outputs = [&] {
        return std::vector<Tensor>{device.poisoned(dtype(), {rows, channels}),
                                   device.poisoned(dtype(), {rows, channels}), device.poisoned(DType::kF32, {rows}),
                                   device.poisoned(DType::kF32, {rows})};
      };
      std::vector<Tensor> fused = outputs(), separate = outputs();
      separate[0] = sum_of(device, a, b);
      device->layernorm_forward(separate[1], separate[2], separate[3], separate[0], weight, bias);
      if (in_place) fused[0] = a;
      device->residual_layernorm_forward(fused[0], fused[1], fused[2], fused[3], a, b, weight, bias);
      for (size_t i = 0; i < fused.size(); ++i) {
        EXPECT_EQ(device.bits(fused[i]), device.bits(separate[i])) << "output " << i << ", channels " << channels;
      }
    }
  }
}

TEST(LayerNormReference, GradientsMatchFiniteDifferences) {
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  auto draw = [&](size_t count) {
    Values values(count);
    for (double& value : values) value = normal(generator);
    return values;
  };
  const Values in = draw(39), weight = draw(13), bias = draw(13), dout = draw(39);
  const Gradients analytic = reference_backward(dout, in, weight);
  auto by_in = [&](const Values& x) { return reference_forward(x, weight, bias).out; };
  auto by_weight = [&](const Values& x) { return reference_forward(in, x, bias).out; };
  auto by_bias = [&](const Values& x) { return reference_forward(in, weight, x).out; };
  EXPECT_LE(relative_error(analytic.in, numeric_gradient(by_in, in, dout)), 1e-8);
  EXPECT_LE(relative_error(analytic.weight, numeric_gradient(by_weight, weight, dout)), 1e-8);
  EXPECT_LE(relative_error(analytic.bias, numeric_gradient(by_bias, bias, dout)), 1e-8);
}

TEST_P(LayerNorm, Backward) {
  for (const bool accumulate : {false, true}) {
    for (const int64_t rows : {1, 35, 1100}) {
      for (const int64_t channels : row_lengths(backend(), {3, 80, 391})) {
        if (rows == 1100 && accumulate != (channels == 80)) continue;  // long, and the same code
        TestDevice device(backend());
        const Tensor in =
            device.random(1, dtype(), {rows, channels}, 2, rows == 35 ? row_length(backend(), channels + 3) : 0);
        const Tensor dout = device.random(2, dtype(), {rows, channels});
        const Tensor weight = device.random(3, dtype(), {channels}), bias = device.random(4, dtype(), {channels});
        const Tensor out = device.poisoned(dtype(), {rows, channels});
        const Tensor mean = device.poisoned(DType::kF32, {rows}), rstd = device.poisoned(DType::kF32, {rows});
        device->layernorm_forward(out, mean, rstd, in, weight, bias);

        const Tensor din = device.random(5, dtype(), {rows, channels}, 0.5);
        const Tensor dweight =
            accumulate ? device.random(6, dtype(), {channels}) : device.poisoned(dtype(), {channels});
        const Tensor dbias = accumulate ? device.random(7, dtype(), {channels}) : device.poisoned(dtype(), {channels});
        Gradients expected = reference_backward(device.read(dout), device.read(in), device.read(weight));
        auto add_old = [&](Values& to, const Tensor& t) {
          const Values old = device.read(t);
          for (size_t i = 0; i < to.size(); ++i) to[i] += old[i];
        };
        add_old(expected.in, din);
        if (accumulate) {
          add_old(expected.weight, dweight);
          add_old(expected.bias, dbias);
        }
        device->layernorm_backward(din, dweight, dbias, accumulate, dout, in, mean, rstd, weight);
        EXPECT_LE(relative_error(device.read(din), expected.in), tolerance(dtype())) << rows << " x " << channels;
        EXPECT_LE(relative_error(device.read(dweight), expected.weight), tolerance(dtype()))
            << rows << " x " << channels;
        EXPECT_LE(relative_error(device.read(dbias), expected.bias), tolerance(dtype())) << rows << " x " << channels;
      }
    }
  }
}

TEST_P(LayerNorm, IndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const int64_t rows = 1033, channels = row_length(backend(), 83);
    const Tensor in = device.random(1, dtype(), {rows, channels}), dout = device.random(2, dtype(), {rows, channels});
    const Tensor weight = device.random(3, dtype(), {channels}), bias = device.random(4, dtype(), {channels});
    const Tensor out = device.poisoned(dtype(), {rows, channels}), din = device.random(5, dtype(), {rows, channels});
    const Tensor mean = device.poisoned(DType::kF32, {rows}), rstd = device.poisoned(DType::kF32, {rows});
    const Tensor dweight = device.poisoned(dtype(), {channels}), dbias = device.poisoned(dtype(), {channels});
    device->layernorm_forward(out, mean, rstd, in, weight, bias);
    device->layernorm_backward(din, dweight, dbias, false, dout, in, mean, rstd, weight);
    std::vector<uint8_t> all;
    for (const Tensor& t : {out, mean, rstd, din, dweight, dbias}) {
      const std::vector<uint8_t> bits = device.bits(t);
      all.insert(all.end(), bits.begin(), bits.end());
    }
    return all;
  });
}

// Weights and their gradients in another dtype than the activations, as under --weight-dtype and --gradient-dtype.
TEST_P(LayerNorm, WeightsOfAnotherDType) {
  TestDevice device(backend());
  const DType other = dtype() == DType::kF32 ? DType::kBF16 : DType::kF32;
  const int64_t rows = 23, channels = 80;
  const Tensor in = device.random(1, dtype(), {rows, channels}), dout = device.random(2, dtype(), {rows, channels});
  const Tensor weight = device.random(3, other, {channels}), bias = device.random(4, other, {channels});
  const Tensor out = device.poisoned(dtype(), {rows, channels});
  const Tensor mean = device.poisoned(DType::kF32, {rows}), rstd = device.poisoned(DType::kF32, {rows});
  device->layernorm_forward(out, mean, rstd, in, weight, bias);
  const Normalized forward = reference_forward(device.read(in), device.read(weight), device.read(bias));
  EXPECT_LE(relative_error(device.read(out), forward.out), tolerance(dtype()));
  const Tensor din = device.upload(Values(static_cast<size_t>(rows * channels)), dtype(), {rows, channels});
  const Tensor dweight = device.poisoned(other, {channels}), dbias = device.poisoned(other, {channels});
  device->layernorm_backward(din, dweight, dbias, false, dout, in, mean, rstd, weight);
  const Gradients expected = reference_backward(device.read(dout), device.read(in), device.read(weight));
  EXPECT_LE(relative_error(device.read(din), expected.in), tolerance(dtype()));
  EXPECT_LE(relative_error(device.read(dweight), expected.weight), tolerance(other));
  EXPECT_LE(relative_error(device.read(dbias), expected.bias), tolerance(other));
}

}  // namespace
