// How many kernels and matrix products the update of a layer of four matrices and its vectors costs, counted where they
// are enqueued. On a GPU each costs about as long as it takes to read a megabyte.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "tests/cuda_on_cpu/stream.h"
#include "tests/fake_model.h"

namespace {

using Counts = std::map<std::string, int64_t>;

// Of a third step, in a model of so many layers.
Counts launches_of_a_step(FakeOptions options, int layers) {
  options.layers = layers;
  FakeModel model(options);
  model.step(1);
  model.step(2);
  Counts counts;
  for (const auto& [name, count] : cuda_on_cpu::launches()) counts[name] -= static_cast<int64_t>(count);
  model.step(3);
  for (const auto& [name, count] : cuda_on_cpu::launches()) counts[name] += static_cast<int64_t>(count);
  return counts;
}

// What one more layer adds. What it is made of is printed where it is too much.
void expect_launches_of_a_layer(const FakeOptions& options, int64_t most) {
  Counts counts = launches_of_a_step(options, 3);
  for (const auto& [name, count] : launches_of_a_step(options, 2)) counts[name] -= count;
  int64_t all = 0;
  std::string list;
  for (const auto& [name, count] : counts) {
    all += count;
    if (count != 0) list += "\n  " + std::to_string(count) + " " + name;
  }
  EXPECT_EQ(all, most) << list;
}

FakeOptions options_of(OptimizerKind kind, GradientMode mode, DType dtype) {
  FakeOptions options;
  options.optimizer.kind = kind;
  options.optimizer.rank = 8;
  options.optimizer.state_dtype = dtype;
  options.gradients.kind = mode;
  options.gradients.gradient_dtype = dtype;
  options.weight_dtype = dtype;
  return options;
}

TEST(Launches, FloraFused) {
  for (DType dtype : {DType::kF32, DType::kBF16})
    expect_launches_of_a_layer(options_of(OptimizerKind::kFlora, GradientMode::kFused, dtype), 29);
}

TEST(Launches, FloraFusedWithResidual) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    FakeOptions options = options_of(OptimizerKind::kFlora, GradientMode::kFused, dtype);
    options.optimizer.residual = true;
    expect_launches_of_a_layer(options, 29);
  }
}

TEST(Launches, AdafactorFused) {
  expect_launches_of_a_layer(options_of(OptimizerKind::kAdafactor, GradientMode::kFused, DType::kBF16), 17);
}

TEST(Launches, AdamWFused) {
  expect_launches_of_a_layer(options_of(OptimizerKind::kAdamW, GradientMode::kFused, DType::kBF16), 5);
}

// One sum of squares and one clip are for several layers or for all of one, beside the updates.
TEST(Launches, AdamWDense) {
  FakeOptions options = options_of(OptimizerKind::kAdamW, GradientMode::kDense, DType::kBF16);
  options.gradients.clip_norm = 1;
  expect_launches_of_a_layer(options, 6);
}

}  // namespace
