// test_adamw.cpp: AdamW and SGD over many steps against float64, the options of parameter groups, and states.
#include "flora/optimizers.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/backends.h"
#include "tests/fake_model.h"

namespace {

FakeOptions options_of(OptimizerKind kind, DType state = DType::kF32) {
  FakeOptions options;
  options.optimizer.kind = kind;
  options.optimizer.state_dtype = state;
  options.optimizer.weight_decay = 0.1f;
  options.gradients.kind = GradientMode::kDense;
  return options;
}

// All weights after `steps` steps in float64; `update` returns a weight's step from its gradient and two states.
template <typename Update>
Values simulate(const Values& initial, uint32_t steps, Update&& update) {
  Values w = initial, m(w.size(), 0), v(w.size(), 0);
  for (uint32_t t = 1; t <= steps; ++t) {
    size_t i = 0;
    for (const Parameter& p : FakeModel::make_parameters()) {
      std::vector<float> g = FakeModel::gradient(p, t, 0, 0);
      if (p.long_lived) {
        const std::vector<float> more = FakeModel::gradient(p, t, 0, 1);
        for (size_t k = 0; k < g.size(); ++k) g[k] += more[k];
      }
      for (float x : g) {
        w[i] -= 0.01 * (update(t, static_cast<double>(x), m[i], v[i]) + (p.decay ? 0.1 * w[i] : 0.0));
        ++i;
      }
    }
  }
  return w;
}

TEST(AdamW, FollowsItsFormulaOverManySteps) {
  FakeModel model(options_of(OptimizerKind::kAdamW));
  const Values expected = simulate(model.weights(), 20, [](uint32_t t, double g, double& m, double& v) {
    m = 0.9 * m + 0.1 * g;
    v = 0.95 * v + 0.05 * g * g;
    return m / (1 - std::pow(0.9, t)) / (std::sqrt(v / (1 - std::pow(0.95, t))) + 1e-8);
  });
  for (uint32_t t = 1; t <= 20; ++t) model.step(t);
  EXPECT_LE(relative_error(model.weights(), expected), 2e-6);
}

TEST(Sgd, FollowsItsFormulaOverManySteps) {
  for (float beta1 : {0.0f, 0.9f}) {
    FakeOptions options = options_of(OptimizerKind::kSgd);
    options.optimizer.beta1 = beta1;
    FakeModel model(options);
    const Values expected = simulate(model.weights(), 20, [&](uint32_t, double g, double& m, double&) {
      m = static_cast<double>(beta1) * m + g;
      return m;
    });
    for (uint32_t t = 1; t <= 20; ++t) model.step(t);
    EXPECT_LE(relative_error(model.weights(), expected), 2e-6);
  }
}

TEST(AdamW, EightBitStatesStayCloseToFp32) {
  FakeModel exact(options_of(OptimizerKind::kAdamW)), quantized(options_of(OptimizerKind::kAdamW, DType::kI8));
  const Values initial = exact.weights();
  for (uint32_t t = 1; t <= 20; ++t) exact.step(t), quantized.step(t);
  Values moved = exact.weights(), moved_quantized = quantized.weights();
  for (size_t i = 0; i < moved.size(); ++i) moved[i] -= initial[i], moved_quantized[i] -= initial[i];
  EXPECT_LE(relative_error(moved_quantized, moved), 0.05);
}

TEST(AdamW, StateHasTheDocumentedTypes) {
  for (DType state : {DType::kF32, DType::kBF16, DType::kI8}) {
    FakeModel model(options_of(OptimizerKind::kAdamW, state));
    for (const StateTensor& s : model.optimizer().state()) {
      const bool matrix = s.tensor.rank == 2, momentum = s.name.ends_with(".momentum");
      DType expected = momentum ? state : DType::kF32;
      if (state == DType::kI8) expected = !matrix ? DType::kF32 : momentum ? DType::kI8 : DType::kU8;
      EXPECT_EQ(s.tensor.dtype, expected) << s.name;
    }
    EXPECT_EQ(model.optimizer().state().size(), 2 * FakeModel::make_parameters().size());
    EXPECT_TRUE(model.optimizer().compressed_parameters().empty());
  }
}

// The learning rate of the blocks' matrices has a factor of its own, for every optimizer.
TEST(Optimizers, ScaleTheRateOfTheBlocksMatrices) {
  for (OptimizerKind kind :
       {OptimizerKind::kAdamW, OptimizerKind::kSgd, OptimizerKind::kAdafactor, OptimizerKind::kFlora}) {
    FakeOptions options = options_of(kind);
    FakeModel plain(options);
    options.optimizer.matrix_lr_scale = 0.5f;
    FakeModel scaled(options);
    const Values initial = plain.weights();
    plain.step(1), scaled.step(1);
    const Values a = plain.weights(), b = scaled.weights();
    size_t i = 0;
    for (const Parameter& p : FakeModel::make_parameters()) {
      const double factor = p.matrix && p.layer >= 0 ? 0.5 : 1;
      for (int64_t k = 0; k < p.elements(); ++k, ++i)
        ASSERT_NEAR(b[i] - initial[i], factor * (a[i] - initial[i]), 2e-7) << p.name;
    }
  }
}

TEST(AdamW, WithoutMomentumKeepsNone) {
  FakeOptions options = options_of(OptimizerKind::kAdamW);
  options.optimizer.beta1 = 0;
  FakeModel model(options);
  model.step(1);
  EXPECT_EQ(model.optimizer().state().size(), FakeModel::make_parameters().size());
}

}  // namespace
