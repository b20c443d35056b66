// test_flora.cpp: what Flora must do beyond single formulas (those: test_flora_reference.cpp): the momentum survives a
// change of projection, its norm changes as theory says, a closed gate leaves a consistent state.
#include "flora/flora.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "tests/backends.h"
#include "tests/device_value.h"
#include "tests/fake_model.h"

namespace {

const bool kProducts = with_products();

constexpr float kBeta1 = 0.9f;

double norm(const Values& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}

double cosine(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum / (norm(a) * norm(b));
}

OptimizerConfig flora_config(int64_t rank, uint32_t kappa, ProjectionKind projection = ProjectionKind::kGaussian,
                             TransferKind transfer = TransferKind::kReencode) {
  OptimizerConfig config;
  config.seed = 31;
  config.beta1 = kBeta1;
  config.rank = rank;
  config.kappa = kappa;
  config.projection = projection;
  config.transfer = transfer;
  return config;
}

Parameter matrix(int64_t rows, int64_t cols) {
  Parameter p;
  p.name = "w";
  p.layer = 0;
  p.rows = p.padded_rows = rows;
  p.cols = cols;
  p.matrix = true;
  return p;
}

// One matrix under Flora, with access to its momentum.
class Bench {
 public:
  Bench(const OptimizerConfig& config, const Parameter& parameter)
      : config_(config), parameter_(parameter), shape_(parameter, config.rank) {
    MemoryPlan plan;
    optimizer_ = make_optimizer(config, {parameter}, DType::kF32, device_.backend());
    optimizer_->declare(plan);
    arena_ = std::make_unique<Arena>(device_.backend(), plan);
    optimizer_->states().zero();
    weight_ = device_.upload(Values(static_cast<size_t>(parameter.elements()), 0.0), DType::kF32,
                             {parameter.rows, parameter.cols});
    gradient_ = device_.poisoned(DType::kF32, {parameter.rows, parameter.cols});
    projection_ = device_.poisoned(DType::kF32, {shape_.rank, shape_.dimension()});
    compressed_ = device_.poisoned(DType::kF32, {shape_.compressed_rows(), shape_.compressed_cols()});
    full_ = device_.poisoned(DType::kF32, {shape_.rows, shape_.cols});
  }

  void step(uint32_t t, const Values& gradient, uint32_t gate = 1) {
    StepScalars scalars;
    scalars.lr = 1e-3f;
    scalars.step = t;
    scalars.gate = gate;
    optimizer_->begin_step(t, scalars);
    scalars_.set(scalars);
    device_.write(gradient_, gradient);
    optimizer_->update(parameter_, weight_, {}, gradient_, scalars_.data());
  }

  Values momentum() {
    device_->dequantize(compressed_, state("momentum"));
    return device_.read(compressed_);
  }

  // up(M) in the projection that M is in after step t.
  Values decoded(uint32_t t) { return decode(momentum(), t / config_.kappa); }

  Values decode(const Values& momentum, uint32_t index) {
    make_projection(index);
    device_.write(compressed_, momentum);
    project_up(device_.backend(), full_, compressed_, projection_, shape_, 1.0f, false);
    return device_.read(full_);
  }

  Values encode(const Values& x, uint32_t index) {
    make_projection(index);
    device_.write(full_, x);
    project_down(device_.backend(), compressed_, full_, projection_, shape_, false);
    return device_.read(compressed_);
  }

  Tensor state(const std::string& what) {
    for (const StateTensor& s : optimizer_->state())
      if (s.name == parameter_.name + "." + what) return s.tensor;
    throw std::logic_error("no state " + what);
  }

  Values weight() { return device_.read(weight_); }
  Optimizer& optimizer() { return *optimizer_; }
  TestDevice& device() { return device_; }

 private:
  void make_projection(uint32_t index) {
    number_.set(index);
    const RandomKey key{.seed = config_.seed, .purpose = RandomPurpose::kProjection, .tensor = parameter_.hash()};
    device_->generate_projection(projection_, config_.projection, key, number_.data());
  }

  TestDevice device_{test_backend_name()};
  OptimizerConfig config_;
  Parameter parameter_;
  Compression shape_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Arena> arena_;
  Tensor weight_, gradient_;
  Tensor projection_, compressed_, full_;  // of the test itself
  DeviceValue<StepScalars> scalars_{device_}, open_gate_{device_};
  DeviceValue<uint32_t> number_{device_};
};

// A gradient that keeps a direction under noise; `t` makes the noise.
Values gradient_of(int64_t count, uint32_t t) {
  std::mt19937 constant(1), noise(100 + t);
  std::normal_distribution<double> normal;
  Values g(static_cast<size_t>(count));
  for (double& x : g) x = normal(constant);
  for (double& x : g) x = static_cast<double>(static_cast<float>(x + normal(noise)));
  return g;
}

// The uncompressed average of U that the compressed one stands for, in float64.
class Reference {
 public:
  Reference(int64_t rows, int64_t cols)
      : rows_(rows), cols_(cols), row_(rows, 0), col_(cols, 0), average_(rows * cols, 0) {}

  // Returns U of this step.
  Values step(uint32_t t, const Values& g) {
    const double beta2 = 1 - std::pow(static_cast<double>(t), -0.8);
    for (double& x : row_) x *= beta2;
    for (double& x : col_) x *= beta2;
    for (size_t i = 0; i < g.size(); ++i) {
      row_[i / cols_] += (1 - beta2) * g[i] * g[i] / static_cast<double>(cols_);
      col_[i % cols_] += (1 - beta2) * g[i] * g[i] / static_cast<double>(rows_);
    }
    double mean = 0;
    for (double x : row_) mean += x / static_cast<double>(rows_);
    Values u(g.size());
    for (size_t i = 0; i < g.size(); ++i) {
      u[i] = g[i] / std::sqrt(row_[i / cols_] / mean * col_[i % cols_]);
      average_[i] = 0.9 * average_[i] + 0.1 * u[i];
    }
    return u;
  }

  const Values& average() const { return average_; }

 private:
  size_t rows_, cols_;
  Values row_, col_, average_;
};

// Cosines of a decoded momentum with the uncompressed average. A Gaussian code keeps 1 / sqrt(1 + d/r) of it; one
// re-encoded in a new projection, that squared. The average never falls far below the latter unless a change of
// projection loses it.
struct Survival {
  double lowest_cosine = 1;
  void see(const Values& decoded, const Values& average) {
    lowest_cosine = std::min(lowest_cosine, cosine(decoded, average));
  }
  bool alive(int64_t d, int64_t r) const {
    return lowest_cosine > 0.75 / (1 + static_cast<double>(d) / static_cast<double>(r));
  }
};

class MomentumSurvival : public ::testing::TestWithParam<std::tuple<bool, int64_t>> {};
INSTANTIATE_TEST_SUITE_P(All, MomentumSurvival,
                         ::testing::Combine(::testing::Bool(), ::testing::Values<int64_t>(8, 16, 32, 48)));

TEST_P(MomentumSurvival, AChangeOfProjection) {
  const auto [wide, rank] = GetParam();
  const int64_t d = 48, rows = wide ? d : 96, cols = wide ? 96 : d;
  const uint32_t kappa = 25, steps = 80;
  Bench bench(flora_config(rank, kappa), matrix(rows, cols));
  Reference reference(rows, cols);
  Survival right, wrong;
  Values wrong_momentum(bench.momentum().size(), 0.0);
  double before_first_change = 0, at_first_change = 0;
  for (uint32_t t = 1; t <= steps; ++t) {
    const Values g = gradient_of(rows * cols, t);
    bench.step(t, g);
    const Values u = reference.step(t, g);
    right.see(bench.decoded(t), reference.average());
    if (t == kappa - 1) before_first_change = cosine(bench.decoded(t), reference.average());
    if (t == kappa) at_first_change = cosine(bench.decoded(t), reference.average());

    // The mistake that this test must be able to see: a momentum re-encoded with the old projection.
    const uint32_t old_index = (t - 1) / kappa, new_index = t / kappa;
    if (old_index != new_index) wrong_momentum = bench.encode(bench.decode(wrong_momentum, old_index), old_index);
    const Values s = bench.encode(u, new_index);
    for (size_t i = 0; i < s.size(); ++i) wrong_momentum[i] = 0.9 * wrong_momentum[i] + 0.1 * s[i];
    wrong.see(bench.decode(wrong_momentum, new_index), reference.average());
  }
  const double kept = 1 / std::sqrt(1 + static_cast<double>(d) / static_cast<double>(rank));
  EXPECT_NEAR(before_first_change, kept, 0.08);
  EXPECT_NEAR(at_first_change, kept * kept, 0.12);
  EXPECT_TRUE(right.alive(d, rank)) << right.lowest_cosine;
  EXPECT_FALSE(wrong.alive(d, rank)) << wrong.lowest_cosine;
}

// With a gradient of zero the momentum only decays, so what a transfer does to its norm shows: a Gaussian one inflates
// it by sqrt(1 + d/r), every time; orthonormal rows keep sqrt(r/d); a restart leaves nothing.
TEST(Transfer, ChangesTheNormAsTheorySays) {
  const int64_t rows = 192, cols = 200, rank = 48;
  const double gaussian = std::sqrt(1 + 4.0), orthonormal = std::sqrt(1 / 4.0);
  struct Case {
    ProjectionKind projection;
    TransferKind transfer;
    double factor;
  };
  for (const Case& c : {Case{ProjectionKind::kGaussian, TransferKind::kReencode, gaussian},
                        Case{ProjectionKind::kRademacher, TransferKind::kReencode, gaussian},
                        Case{ProjectionKind::kCosine, TransferKind::kReencode, orthonormal},
                        Case{ProjectionKind::kGaussian, TransferKind::kRescale, 1},
                        Case{ProjectionKind::kCosine, TransferKind::kRescale, 1},
                        Case{ProjectionKind::kGaussian, TransferKind::kRestart, 0}}) {
    Bench bench(flora_config(rank, 5, c.projection, c.transfer), matrix(rows, cols));
    for (uint32_t t = 1; t <= 4; ++t) bench.step(t, gradient_of(rows * cols, t));
    double before = norm(bench.momentum());
    EXPECT_GT(before, 0);
    for (uint32_t t = 5; t <= 15 && before > 0; ++t) {
      bench.step(t, Values(static_cast<size_t>(rows * cols), 0.0));
      const double after = norm(bench.momentum()), expected = t % 5 == 0 ? c.factor : 1.0;
      EXPECT_NEAR(after / (0.9 * before), expected, (expected == 1.0 ? 1e-5 : 0.12) * expected + 1e-7) << "step " << t;
      before = after;
    }
  }
}

// What one transfer does to the norm, and what the momentum decays until the next.
TEST(Transfer, GrowthIsThatOfTheLargestCompressedParameter) {
  Parameter embedding = matrix(50000, 64), weight = matrix(192, 400);
  weight.index = 1;
  const std::vector<Parameter> parameters = {embedding, weight};
  const auto growth = [&](ProjectionKind projection, TransferKind transfer, uint32_t kappa, float beta1) {
    OptimizerConfig config = flora_config(48, kappa, projection, transfer);
    config.beta1 = beta1;
    return transfer_growth(config, parameters);
  };
  const auto gaussian = ProjectionKind::kGaussian, rademacher = ProjectionKind::kRademacher;
  const auto reencode = TransferKind::kReencode;
  EXPECT_NEAR(growth(gaussian, reencode, 3, 0.9f), 0.729 * std::sqrt(1 + 193.0 / 48), 1e-6);
  EXPECT_NEAR(growth(rademacher, reencode, 3, 0.9f), 0.729 * std::sqrt(1 + 191.0 / 48), 1e-6);
  EXPECT_LT(growth(gaussian, reencode, 1000, 0.9f), 1e-40);
  EXPECT_EQ(growth(ProjectionKind::kCosine, reencode, 1, 0.9f), 0);
  EXPECT_EQ(growth(gaussian, TransferKind::kRescale, 1, 0.9f), 0);
  EXPECT_EQ(growth(gaussian, TransferKind::kRestart, 1, 0.9f), 0);
  EXPECT_EQ(growth(gaussian, reencode, 1, 0.0f), 0);
  OptimizerConfig wide = flora_config(256, 1, gaussian, reencode);  // nothing has that rank
  EXPECT_EQ(transfer_growth(wide, parameters), 0);
}

// On either side of a growth of 1, over 12 transfers: re-encoding runs away above it and not below, and what is chosen
// by default never does.
TEST(Transfer, TheDefaultIsBounded) {
  const int64_t rows = 32, cols = 40, rank = 4;
  const auto config = [&](uint32_t kappa) {
    return flora_config(rank, kappa, ProjectionKind::kGaussian, TransferKind::kReencode);
  };
  const auto largest = [&](OptimizerConfig used) {
    Bench bench(used, matrix(rows, cols));
    double most = 0;
    for (uint32_t t = 1; t <= 12 * used.kappa; ++t) {
      bench.step(t, gradient_of(rows * cols, t));
      most = std::max(most, norm(bench.momentum()));
    }
    return most;
  };
  OptimizerConfig chosen = config(2);  // growth 2.5
  chosen.transfer = bounded_transfer(chosen, {matrix(rows, cols)});
  EXPECT_EQ(chosen.transfer, TransferKind::kRescale);
  const double bounded = largest(chosen);
  EXPECT_GT(largest(config(2)), 100 * bounded);
  EXPECT_EQ(bounded_transfer(config(16), {matrix(rows, cols)}), TransferKind::kReencode);  // growth 0.56
  EXPECT_LT(largest(config(16)), 10 * bounded);
}

TEST(Transfer, HappensBehindAClosedGate) {
  const int64_t rows = 48, cols = 96;
  for (DType state : {DType::kF32, DType::kBF16, DType::kI8}) {
    OptimizerConfig config = flora_config(48, 5);
    config.state_dtype = state;
    Bench bench(config, matrix(rows, cols));
    for (uint32_t t = 1; t <= 4; ++t) bench.step(t, gradient_of(rows * cols, t));
    const Values weight = bench.weight(), decoded = bench.decoded(4), before = bench.momentum();
    const auto row = bench.device().bits(bench.state("row"));
    bench.step(5, Values(static_cast<size_t>(rows * cols), NAN), 0);
    EXPECT_EQ(bench.weight(), weight);
    EXPECT_EQ(bench.device().bits(bench.state("row")), row);
    EXPECT_LE(relative_error(bench.momentum(), bench.encode(bench.decode(before, 0), 1)),
              state == DType::kF32 ? 1e-5 : 2e-2);
    EXPECT_GT(cosine(bench.decoded(5), decoded), 0.6);
  }
}

TEST(Flora, AClosedGateBetweenTransfersChangesNothing) {
  const int64_t rows = 48, cols = 96;
  for (DType state : {DType::kF32, DType::kBF16, DType::kI8}) {
    OptimizerConfig config = flora_config(16, 100);
    config.state_dtype = state;
    Bench bench(config, matrix(rows, cols));
    bench.step(1, gradient_of(rows * cols, 1));
    const Values weight = bench.weight();
    const auto momentum = bench.device().bits(bench.state("momentum")), col = bench.device().bits(bench.state("col"));
    bench.step(2, Values(static_cast<size_t>(rows * cols), NAN), 0);
    EXPECT_EQ(bench.weight(), weight);
    EXPECT_EQ(bench.device().bits(bench.state("momentum")), momentum);
    EXPECT_EQ(bench.device().bits(bench.state("col")), col);
  }
}

TEST(Flora, StateIsSmallAndNamed) {
  Bench bench(flora_config(16, 100), matrix(64, 200));
  EXPECT_EQ(bench.state("momentum").elements(), 16 * 200);
  EXPECT_EQ(bench.state("row").elements(), 64);
  EXPECT_EQ(bench.state("col").elements(), 200);
  EXPECT_EQ(bench.optimizer().state().size(), 3u);
  EXPECT_EQ(bench.optimizer().compressed_parameters(), std::vector<std::string>{"w"});
}

// The large one as with beta1 = 0, all else as with a momentum for all.
TEST(Flora, EmbeddingsMayGoWithoutMomentum) {
  for (OptimizerKind kind : {OptimizerKind::kFlora, OptimizerKind::kAdafactor}) {
    for (DType state : {DType::kF32, DType::kI8}) {
      const auto trained = [&](float beta1, bool embedding_momentum) {
        FakeOptions options;
        options.optimizer.kind = kind;
        options.optimizer.rank = 8;
        options.optimizer.kappa = 2;
        options.optimizer.residual = kind == OptimizerKind::kFlora;
        options.optimizer.state_dtype = state;
        options.optimizer.beta1 = beta1;
        options.optimizer.embedding_momentum = embedding_momentum;
        auto model = std::make_unique<FakeModel>(options);
        for (uint32_t t = 1; t <= 3; ++t) model->step(t);
        return model;
      };
      const auto some = trained(0.9f, false), none = trained(0, true), all = trained(0.9f, true);
      const std::vector<double> weights = some->weights(), without = none->weights(), with = all->weights();
      size_t i = 0;
      for (const Parameter& p : some->store().parameters()) {
        for (int64_t j = 0; j < p.elements(); ++j, ++i)
          ASSERT_EQ(weights[i], p.name == "wte.weight" ? without[i] : with[i]) << p.name;
      }
      EXPECT_EQ(some->optimizer().state().size() + 1, all->optimizer().state().size());
    }
  }
}

TEST(Flora, RejectsWhatCannotBeMeant) {
  TestDevice device(test_backend_name());
  EXPECT_THROW(make_optimizer(flora_config(16, 0), {matrix(64, 64)}, DType::kF32, device.backend()),
               std::invalid_argument);
  Parameter misplaced = matrix(64, 64);
  misplaced.index = 3;
  EXPECT_THROW(make_optimizer(flora_config(16, 5), {misplaced}, DType::kF32, device.backend()), std::logic_error);
}

}  // namespace
