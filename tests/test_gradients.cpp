// test_gradients.cpp: what happens to gradients: the modes agree where they must, exactly; compressed sums come closer
// to dense ones with their rank; what is planned is what is used; gradients that are not finite change nothing.
#include "flora/gradients.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/backends.h"
#include "tests/fake_model.h"

namespace {

const OptimizerKind kOptimizers[] = {OptimizerKind::kFlora, OptimizerKind::kAdafactor, OptimizerKind::kAdamW,
                                     OptimizerKind::kSgd};

FakeOptions options_of(GradientMode mode, OptimizerKind optimizer = OptimizerKind::kFlora, int micro_batches = 1) {
  FakeOptions options;
  options.optimizer.kind = optimizer;
  options.optimizer.rank = 8;
  options.optimizer.kappa = 3;
  options.optimizer.weight_decay = 0.1f;
  options.optimizer.seed = options.gradients.seed = 5;
  options.gradients.kind = mode;
  options.gradients.micro_batches = micro_batches;
  if (mode == GradientMode::kCompressed) options.gradients.accumulation_rank = 8;
  return options;
}

void run(FakeModel& model, uint32_t steps = 7) {
  for (uint32_t t = 1; t <= steps; ++t) model.step(t);
}

void use_bf16(FakeOptions& options) {
  options.weight_dtype = options.gradients.gradient_dtype = options.optimizer.state_dtype = DType::kBF16;
}

Values moved(const Values& from, const Values& to) {
  Values difference(from.size());
  for (size_t i = 0; i < from.size(); ++i) difference[i] = to[i] - from[i];
  return difference;
}

double sum_of_squares(uint32_t t, int micro_batches) {
  double sum = 0;
  for (const Parameter& p : FakeModel::make_parameters()) {
    Values total(static_cast<size_t>(p.elements()), 0);
    for (int i = 0; i < micro_batches; ++i)
      for (int part = 0; part < (p.long_lived ? 2 : 1); ++part) {
        const std::vector<float> g = FakeModel::gradient(p, t, i, part);
        for (size_t k = 0; k < g.size(); ++k) total[k] += static_cast<double>(g[k]);
      }
    for (double x : total) sum += x * x;
  }
  return sum;
}

// ---- agreement

TEST(Gradients, FusedEqualsDenseBitForBit) {
  for (OptimizerKind kind : kOptimizers) {
    for (int micro_batches : {1, 3}) {
      for (int variant = 0; variant < 4; ++variant) {
        FakeOptions dense = options_of(GradientMode::kDense, kind, micro_batches);
        if (variant == 1) use_bf16(dense);
        if (variant == 2) dense.optimizer.state_dtype = DType::kI8;
        if (variant == 3) use_bf16(dense), dense.gradients.accumulation_dtype = DType::kBF16, dense.masters = true;
        FakeOptions fused = dense;
        fused.gradients.kind = GradientMode::kFused;
        FakeModel a(dense), b(fused);
        run(a), run(b);
        EXPECT_EQ(a.weight_bits(), b.weight_bits()) << variant;
        EXPECT_EQ(a.state_bits(), b.state_bits()) << variant;
        EXPECT_NEAR(a.gradient_squares() / b.gradient_squares(), 1, 1e-5);
        EXPECT_GT(b.store().changed(), 0);
      }
    }
  }
}

TEST(Gradients, RepeatAndDoNotDependOnThreads) {
  for (GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
    FakeOptions options = options_of(mode, OptimizerKind::kFlora, 2);
    use_bf16(options);
    options.gradients.accumulation_dtype = DType::kBF16;
    std::vector<uint8_t> expected;
    for (int threads : {1, 2, 5, 2}) {
      options.threads = threads;
      FakeModel model(options);
      run(model);
      if (expected.empty()) expected = model.weight_bits();
      EXPECT_EQ(model.weight_bits(), expected) << threads;
    }
  }
}

// The states and the weights are all there is: a run that goes on from copies of them is the same run.
TEST(Gradients, ResumeFromWeightsAndStates) {
  for (OptimizerKind kind : kOptimizers) {
    FakeOptions options = options_of(GradientMode::kFused, kind);
    options.optimizer.state_dtype = DType::kI8;
    FakeModel whole(options), first(options), second(options);
    run(whole, 8);
    run(first, 4);
    const auto from = first.optimizer().state(), to = second.optimizer().state();
    ASSERT_EQ(from.size(), to.size());
    const auto copy = [&](void* target, const void* source, size_t bytes) {
      const std::vector<uint8_t> bits = first.bits_of(source, bytes);
      second.backend().copy(target, bits.data(), bytes);
    };
    for (size_t i = 0; i < from.size(); ++i) {
      ASSERT_EQ(from[i].name, to[i].name);
      copy(to[i].tensor.data, from[i].tensor.data, from[i].tensor.bytes());
      if (from[i].tensor.scales)
        copy(to[i].tensor.scales, from[i].tensor.scales,
             static_cast<size_t>(quant_blocks(from[i].tensor.elements())) * 4);
    }
    for (const Parameter& p : first.store().parameters()) {
      first.store().acquire(p.layer), second.store().acquire(p.layer);
      copy(second.store().weight(p).data, first.store().weight(p).data, first.store().weight(p).bytes());
      first.store().release(p.layer, false), second.store().release(p.layer, true);
    }
    for (uint32_t t = 5; t <= 8; ++t) second.step(t);
    EXPECT_EQ(second.weight_bits(), whole.weight_bits());
    EXPECT_EQ(second.state_bits(), whole.state_bits());
  }
}

// ---- norm and clipping

TEST(Gradients, ReportTheGlobalNorm) {
  for (GradientMode mode : {GradientMode::kDense, GradientMode::kFused}) {
    for (int micro_batches : {1, 3}) {
      FakeModel model(options_of(mode, OptimizerKind::kSgd, micro_batches));
      run(model, 2);
      EXPECT_NEAR(model.gradient_squares() / sum_of_squares(2, micro_batches), 1, 1e-5);
    }
  }
}

TEST(Gradients, ClipByTheGlobalNorm) {
  for (GradientMode mode : {GradientMode::kDense, GradientMode::kFused}) {
    for (int micro_batches : {1, 3}) {
      for (float clip_norm : {0.1f, 1000.0f}) {
        FakeOptions options = options_of(mode, OptimizerKind::kSgd, micro_batches);
        options.optimizer.beta1 = options.optimizer.weight_decay = 0;
        FakeModel free(options);
        options.gradients.clip_norm = clip_norm;
        FakeModel clipped(options);
        EXPECT_EQ(clipped.gradients().needs_norm_pass(), mode == GradientMode::kFused);
        const Values initial = free.weights();
        free.step(1), clipped.step(1);
        Values expected = moved(initial, free.weights());
        const double norm = std::sqrt(sum_of_squares(1, micro_batches));
        for (double& x : expected) x *= std::min(1.0, clip_norm / norm);
        EXPECT_LE(relative_error(moved(initial, clipped.weights()), expected), 1e-4);
        EXPECT_NEAR(clipped.gradient_squares() / (norm * norm), 1, 1e-5);  // before clipping
        EXPECT_NEAR(clipped.scalars().gradient_scale, std::min(1.0, clip_norm / norm), 1e-5);
      }
    }
  }
}

TEST(Gradients, FusedAndDenseClipAlike) {
  for (int micro_batches : {1, 2}) {
    FakeOptions dense = options_of(GradientMode::kDense, OptimizerKind::kAdamW, micro_batches);
    dense.gradients.clip_norm = 0.2f;
    FakeOptions fused = dense;
    fused.gradients.kind = GradientMode::kFused;
    FakeModel a(dense), b(fused);
    run(a), run(b);
    EXPECT_LE(relative_error(b.weights(), a.weights()), 1e-5);
  }
}

// ---- gradients that are not finite

TEST(Gradients, SkipAStepWhoseGradientIsNotFinite) {
  for (GradientMode mode : {GradientMode::kDense, GradientMode::kCompressed}) {
    for (float clip_norm : {0.0f, 0.5f}) {
      FakeOptions options = options_of(mode, OptimizerKind::kFlora, 2);
      options.gradients.clip_norm = clip_norm;
      options.poisoned_step = 2;  // not a transfer step: those move the momentum to its next projection
      FakeModel model(options);
      model.step(1);
      const auto weights = model.weight_bits(), states = model.state_bits();
      model.step(2);
      EXPECT_EQ(model.scalars().gate, 0u);
      EXPECT_EQ(model.weight_bits(), weights);
      EXPECT_EQ(model.state_bits(), states);
      model.step(3);
      EXPECT_EQ(model.scalars().gate, 1u);
      EXPECT_NE(model.weight_bits(), weights);
      for (double w : model.weights()) ASSERT_TRUE(std::isfinite(w));
    }
  }
}

TEST(Gradients, FusedShowsAGradientThatIsNotFinite) {
  FakeOptions options = options_of(GradientMode::kFused);
  options.poisoned_step = 2;
  FakeModel model(options);
  run(model, 1);
  EXPECT_TRUE(std::isfinite(model.gradient_squares()));
  model.step(2);
  EXPECT_FALSE(std::isfinite(model.gradient_squares()));
}

TEST(Gradients, FusedWithClippingSkipsAGradientThatIsNotFinite) {
  FakeOptions options = options_of(GradientMode::kFused);
  options.gradients.clip_norm = 1;
  options.poisoned_step = 2;
  FakeModel model(options);
  model.step(1);
  const auto weights = model.weight_bits();
  model.step(2);
  EXPECT_EQ(model.weight_bits(), weights);
}

// ---- accumulation

// How far one step of plain SGD with compressed sums is from the exact one, over the compressed parameters.
double compression_error(GradientMode mode, ProjectionKind projection, int64_t rank, int micro_batches) {
  FakeOptions exact = options_of(GradientMode::kDense, OptimizerKind::kSgd, micro_batches);
  exact.optimizer.beta1 = exact.optimizer.weight_decay = 0;
  FakeOptions compressed = exact;
  compressed.gradients.kind = mode;
  compressed.gradients.accumulation_rank = rank;
  compressed.gradients.projection = projection;
  FakeModel a(exact), b(compressed);
  const Values initial = a.weights();
  a.step(1), b.step(1);
  const Values all_expected = moved(initial, a.weights()), all_actual = moved(initial, b.weights());
  Values expected, actual;
  size_t begin = 0;
  for (const Parameter& p : FakeModel::make_parameters()) {
    const size_t end = begin + static_cast<size_t>(p.elements());
    if (p.matrix && p.layer >= 0) {
      expected.insert(expected.end(), &all_expected[begin], &all_expected[end]);
      actual.insert(actual.end(), &all_actual[begin], &all_actual[end]);
    }
    begin = end;
  }
  return relative_error(actual, expected);
}

TEST(Gradients, CompressedSumsApproachDenseOnesWithTheirRank) {
  const double d = 24;
  for (double rank : {4.0, 8.0, 16.0, 23.0}) {
    const int64_t r = static_cast<int64_t>(rank);
    EXPECT_NEAR(compression_error(GradientMode::kCompressed, ProjectionKind::kGaussian, r, 3) / std::sqrt(d / rank), 1,
                0.25);
    EXPECT_NEAR(compression_error(GradientMode::kCompressed, ProjectionKind::kCosine, r, 3) / std::sqrt(d / rank - 1),
                1, 0.15);
  }
}

TEST(Gradients, FusedUsesItsLastMicroBatchExactly) {
  const double all = compression_error(GradientMode::kCompressed, ProjectionKind::kGaussian, 8, 4);
  const double but_last = compression_error(GradientMode::kFused, ProjectionKind::kGaussian, 8, 4);
  EXPECT_NEAR(but_last / all, std::sqrt(3.0 / 4.0), 0.1);
}

TEST(Gradients, Bf16SumsAreCloseAndUnbiased) {
  for (GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed}) {
    FakeOptions exact = options_of(mode, OptimizerKind::kSgd, 8);
    exact.optimizer.beta1 = exact.optimizer.weight_decay = 0;
    FakeOptions rounded = exact;
    rounded.gradients.accumulation_dtype = DType::kBF16;
    FakeModel a(exact), b(rounded);
    const Values initial = a.weights();
    a.step(1), b.step(1);
    const Values expected = moved(initial, a.weights()), actual = moved(initial, b.weights());
    const double error = relative_error(actual, expected);
    EXPECT_GT(error, 1e-4);
    EXPECT_LT(error, 1e-2);
    double bias = 0, size = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      bias += (actual[i] - expected[i]) * (expected[i] > 0 ? 1 : -1);
      size += std::fabs(expected[i]);
    }
    EXPECT_LT(std::fabs(bias / size), 4 * error / std::sqrt(static_cast<double>(expected.size())));
  }
}

// ---- memory

TEST(Gradients, PlanIsWhatIsAllocated) {
  int combination = 0;
  for (OptimizerKind kind : kOptimizers)
    for (GradientMode mode : {GradientMode::kDense, GradientMode::kFused, GradientMode::kCompressed})
      for (int micro_batches : {1, 2})
        for (DType state : {DType::kF32, DType::kBF16, DType::kI8})
          for (DType gradient : {DType::kF32, DType::kBF16})
            for (DType accumulation : {DType::kF32, DType::kBF16})
              for (ProjectionKind projection : {ProjectionKind::kGaussian, ProjectionKind::kCosine})
                for (int64_t accumulation_rank : {0, 8, 20}) {
                  if (mode == GradientMode::kCompressed && accumulation_rank == 0) continue;
                  FakeOptions options = options_of(mode, kind, micro_batches);
                  options.optimizer.state_dtype = state;
                  options.optimizer.projection = options.gradients.projection = projection;
                  options.optimizer.residual = projection == ProjectionKind::kCosine;
                  options.gradients.gradient_dtype = gradient;
                  options.gradients.accumulation_dtype = accumulation;
                  options.gradients.accumulation_rank = accumulation_rank;
                  if (accumulation_rank == 20) options.optimizer.rank = 20;  // by transforms, where the device has them
                  FakeModel model(options);
                  ASSERT_EQ(model.backend().allocated_bytes(), model.arena().plan().device_bytes());
                  if (test_backend_name() != "cpu" && combination++ % 7 != 0) continue;  // a step takes long there
                  run(model, 3);
                  for (double w : model.weights()) ASSERT_TRUE(std::isfinite(w));
                }
}

size_t gradient_bytes(const FakeOptions& options) {
  FakeModel model(options);
  size_t bytes = 0;
  for (const Allocation& a : model.arena().plan().allocations())
    if (a.category == Category::kGradients) bytes += a.bytes;
  return bytes;
}

TEST(Gradients, GradientMemory) {
  const size_t all = 4 * (256 * 24 + 20 * 24 + 2 * (2 * 24 + 72 + 24 + 24 * (72 + 24 + 96 + 96)) + 2 * 24);
  EXPECT_EQ(gradient_bytes(options_of(GradientMode::kDense)), all);
  // The tied embedding, the largest other matrix, one layer's vectors and those outside, each a multiple of 256 bytes.
  const size_t fused = 4 * (256 * 24 + 96 * 24 + (64 + 64 + 128 + 64) + (64 + 64));
  EXPECT_EQ(gradient_bytes(options_of(GradientMode::kFused)), fused);
  const size_t sums = 4 * (8 * 24 + 2 * (8 * (72 + 24 + 96 + 96)));  // wpe and the blocks' matrices, rank 8
  const size_t vectors = 4 * (2 * (2 * 24 + 72 + 24) + 2 * 24);
  EXPECT_EQ(gradient_bytes(options_of(GradientMode::kCompressed)), 4 * (256 * 24 + 96 * 24) + sums + vectors);
}

TEST(Gradients, RejectWhatCannotBeMeant) {
  FakeOptions options = options_of(GradientMode::kCompressed);
  options.gradients.accumulation_rank = 0;
  EXPECT_THROW(FakeModel model(options), std::invalid_argument);
  options = options_of(GradientMode::kFused);
  options.gradients.micro_batches = 0;
  EXPECT_THROW(FakeModel model(options), std::invalid_argument);
}

}  // namespace
