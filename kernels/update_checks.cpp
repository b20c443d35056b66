// update_checks.cpp: the operations of optimizers against their formulas; see checks.h. On a matrix of the model's
// width, with weights in fp32, whose rounding is no matter of chance.
#include <cmath>

#include "kernels/check_bench.h"
#include "kernels/checks.h"

namespace {

constexpr int64_t kMostRows = 1024, kMostCols = 4096;

int64_t rows_of(const CheckShapes& s) { return std::min(s.channels, kMostRows); }
int64_t cols_of(const CheckShapes& s) { return std::min(4 * s.channels, kMostCols); }

StepScalars step_3() {
  StepScalars scalars;
  scalars.lr = 0.01f, scalars.beta2 = 0.9f, scalars.step = 3;
  scalars.bias_correction1 = 0.271f, scalars.bias_correction2 = 0.1426f;
  return scalars;
}

// Random numbers with their defining property: N(0, 1)/sqrt(r), +-1/sqrt(r), or orthonormal rows.
Difference projection(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const Tensor p = bench.poisoned(DType::kF32, {s.rank, s.channels});
  const RandomKey key{.seed = 3, .purpose = RandomPurpose::kProjection, .tensor = 5};
  const StepScalars* const scalars = bench.upload(StepScalars{});
  backend.generate_projection(p, s.projection, key, &scalars->step);
  const double root = std::sqrt(static_cast<double>(s.rank));
  const RandomMatrix normals{Tensor::of(nullptr, DType::kF32, {s.rank, s.channels}), key};
  const std::vector<int64_t> rows = spread(s.rank, 8);
  Comparison comparison;
  std::vector<std::vector<double>> read;
  for (const int64_t row : rows) read.push_back(bench.read(p, row));
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::vector<double> expected =
        s.projection == ProjectionKind::kGaussian ? normals.row(rows[i]) : std::vector<double>();
    for (size_t c = 0; c < read[i].size() && s.projection != ProjectionKind::kCosine; ++c) {
      if (expected.empty()) {
        comparison.add(std::abs(read[i][c]), 1 / root, 0);
      } else {
        comparison.add(read[i][c], expected[c] / root, 1 / root);
      }
    }
    for (size_t j = 0; j <= i && s.projection == ProjectionKind::kCosine; ++j) {
      double product = 0;
      for (size_t c = 0; c < read[i].size(); ++c) product += read[i][c] * read[j][c];
      comparison.add(product, i == j ? 1 : 0, 1);
    }
  }
  comparison.require(bench.all_finite(p));
  return comparison.allowing(1e-3);
}

Difference factored_second_moment(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix grad = bench.normal(s.gradients, rows, cols);
  const RandomMatrix row = bench.normal(DType::kF32, 1, rows), col = bench.normal(DType::kF32, 1, cols);
  backend.fill_constant(row.tensor, 0.5f);
  backend.fill_constant(col.tensor, 0.5f);
  const Tensor row_scale = bench.poisoned(DType::kF32, {rows}), col_scale = bench.poisoned(DType::kF32, {cols});
  constexpr double kBeta2 = 0.9, kStart = 0.5;
  backend.factored_second_moment(row.tensor.view({rows}), col.tensor.view({cols}), row_scale, col_scale, grad.tensor,
                                 1e-30f, bench.upload(step_3()));
  std::vector<double> of_rows(static_cast<size_t>(rows)), of_cols(static_cast<size_t>(cols));
  for (size_t i = 0; i < of_rows.size(); ++i) {
    const std::vector<double> g = grad.row(static_cast<int64_t>(i));
    for (size_t j = 0; j < g.size(); ++j) of_rows[i] += g[j] * g[j], of_cols[j] += g[j] * g[j];
  }
  double mean = 0;
  for (double& x : of_rows) {
    x = kBeta2 * kStart + (1 - kBeta2) * x / static_cast<double>(cols);
    mean += x / static_cast<double>(rows);
  }
  Comparison comparison;
  const std::vector<double> new_row = bench.read(row.tensor, 0), new_col = bench.read(col.tensor, 0);
  const std::vector<double> by_row = bench.read(row_scale, 0), by_col = bench.read(col_scale, 0);
  for (size_t i = 0; i < of_rows.size(); ++i) {
    comparison.add(new_row[i], of_rows[i], 0);
    comparison.add(by_row[i], 1 / std::sqrt(of_rows[i] / mean), 0);
  }
  for (size_t j = 0; j < of_cols.size(); ++j) {
    const double x = kBeta2 * kStart + (1 - kBeta2) * of_cols[j] / static_cast<double>(rows);
    comparison.add(new_col[j], x, 0);
    comparison.add(by_col[j], 1 / std::sqrt(x), 0);
  }
  return comparison.allowing(1e-4);
}

Difference scale_rows_cols(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix in = bench.normal(s.gradients, rows, cols);
  const RandomMatrix by_row = bench.normal(DType::kF32, 1, rows), by_col = bench.normal(DType::kF32, 1, cols);
  const Tensor out = bench.poisoned(s.gradients, {rows, cols});
  backend.scale_rows_cols(out, in.tensor, by_row.tensor.view({rows}), by_col.tensor.view({cols}), 0.5f);
  Comparison comparison;
  const std::vector<double> left = by_row.row(0), right = by_col.row(0);
  for (const int64_t row : spread(rows, 8)) {
    const std::vector<double> x = in.row(row), result = bench.read(out, row);
    for (size_t c = 0; c < x.size(); ++c)
      comparison.add(result[c], 0.5 * x[c] * left[static_cast<size_t>(row)] * right[c], 0);
  }
  comparison.require(bench.all_finite(out));
  return comparison.allowing(rounding_of(s.gradients));
}

Difference apply_update(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix weight = bench.normal(DType::kF32, rows, cols), update = bench.normal(s.gradients, rows, cols);
  const RandomMatrix squares = bench.normal(DType::kF32, 1, 1);
  const double elements = static_cast<double>(rows * cols);
  backend.fill_constant(squares.tensor, static_cast<float>(4 * elements));  // rms 2, clipped to 1
  backend.apply_update(weight.tensor, {}, update.tensor, {.weight_decay = 0.1f, .clip = 1.0f},
                       squares.tensor.as<float>(), nullptr, rows * cols, {}, bench.upload(step_3()));
  Comparison comparison;
  for (const int64_t row : spread(rows, 8)) {
    const std::vector<double> w = weight.row(row), u = update.row(row), result = bench.read(weight.tensor, row);
    for (size_t c = 0; c < w.size(); ++c)
      comparison.add(result[c] - w[c], -0.01 * (0.1 * w[c] + u[c] / 2), 0.01 * (std::abs(w[c]) + std::abs(u[c])));
  }
  comparison.require(bench.all_finite(weight.tensor));
  return comparison.allowing(1e-3);
}

Difference adamw_update(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix weight = bench.normal(DType::kF32, rows, cols), grad = bench.normal(s.gradients, rows, cols);
  const Tensor m = bench.poisoned(DType::kF32, {rows, cols}), v = bench.poisoned(DType::kF32, {rows, cols});
  backend.fill_constant(m, 0.5f);
  backend.fill_constant(v, 0.25f);
  backend.adamw_update(
      {.weight = weight.tensor, .momentum = m, .second_moment = v, .grad = grad.tensor, .weight_decay = 0.1f}, {},
      bench.upload(step_3()));
  Comparison comparison;
  const StepScalars scalars = step_3();
  for (const int64_t row : spread(rows, 8)) {
    const std::vector<double> w = weight.row(row), g = grad.row(row), result = bench.read(weight.tensor, row);
    for (size_t c = 0; c < w.size(); ++c) {
      const double new_m = 0.9 * 0.5 + 0.1 * g[c], new_v = 0.95 * 0.25 + 0.05 * g[c] * g[c];
      const double step = new_m / static_cast<double>(scalars.bias_correction1) /
                          (std::sqrt(new_v / static_cast<double>(scalars.bias_correction2)) + 1e-8);
      comparison.add(result[c] - w[c], -0.01 * (step + 0.1 * w[c]), 0.01 * (std::abs(step) + std::abs(w[c])));
    }
  }
  comparison.require(bench.all_finite(weight.tensor));
  return comparison.allowing(1e-3);
}

}  // namespace

std::vector<Check> update_checks(const CheckShapes& s) {
  std::vector<Check> checks;
  const std::string matrix = shape_text({rows_of(s), cols_of(s)}) + " ";
  const auto add = [&](const char* operation, const std::string& shape, auto function) {
    checks.push_back({operation, shape, [=](Backend& backend) { return function(backend, s); }});
  };
  const std::string of_gradients = matrix + dtype_name(s.gradients);
  add("factored_second_moment", of_gradients, factored_second_moment);
  add("scale_rows_cols", of_gradients, scale_rows_cols);
  add("apply_update", of_gradients, apply_update);
  add("adamw_update", of_gradients, adamw_update);
  if (s.rank <= 0 || s.rank >= s.channels) return checks;
  add("generate_projection", shape_text({s.rank, s.channels}) + " fp32", projection);
  const DType projected = s.activations == DType::kBF16 ? DType::kBF16 : s.gradients;
  // What one micro-batch leaves, and the fp32 sum of several.
  std::vector<DType> gradients = {s.gradients};
  if (s.gradients != DType::kF32) gradients.push_back(DType::kF32);
  for (const DType gradient : gradients) {
    checks.push_back(product_check(
        {.m = s.rank, .n = 4 * s.channels, .k = s.channels, .out = DType::kF32, .a = projected, .b = gradient},
        s.tf32));
  }
  checks.push_back(product_check({.m = s.channels,
                                  .n = 4 * s.channels,
                                  .k = s.rank,
                                  .out = s.gradients,
                                  .a = projected,
                                  .b = projected,
                                  .transpose_a = true,
                                  .accumulate = true},
                                 s.tf32));
  return checks;
}
