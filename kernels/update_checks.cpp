// update_checks.cpp: the operations of optimizers against their formulas; see checks.h. On a matrix of the model's
// width, with weights in fp32, whose rounding is no matter of chance.
#include <cmath>

#include "kernels/check_bench.h"
#include "kernels/checks.h"

namespace {

constexpr int64_t kMostRows = 1024, kMostCols = 4096;

constexpr double kMomentum = 0.5, kSecondMoment = 0.25;  // before an update
constexpr double kDecay = 0.1;

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

// The vectors that are projected are columns (of_rows), or else rows; against the projection that is made.
Difference cosine_transform(Backend& backend, const CheckShapes& s, bool up, bool of_rows) {
  constexpr int64_t kVectors = 40;
  CheckBench bench(backend);
  const int64_t d = s.channels, r = s.rank;
  const StepScalars* const scalars = bench.upload(StepScalars{});
  const CosineProjection p = {.rank = r,
                              .of_rows = of_rows,
                              .key = {.seed = 3, .purpose = RandomPurpose::kProjection, .tensor = 5},
                              .index = &scalars->step};
  const Tensor made = bench.poisoned(DType::kF32, {r, d});
  backend.generate_projection(made, ProjectionKind::kCosine, p.key, p.index);
  const std::vector<double> projection = bench.read(made, 0, r);
  const auto weight = [&](int64_t k, int64_t j) { return projection[static_cast<size_t>(k * d + j)]; };
  const int64_t from = up ? r : d, to = up ? d : r;  // numbers of a vector, before and after
  const RandomMatrix in =
      of_rows ? bench.normal(s.gradients, from, kVectors) : bench.normal(s.gradients, kVectors, from);
  const DType dtype = up ? s.gradients : DType::kF32;
  const Tensor out = of_rows ? bench.poisoned(dtype, {to, kVectors}) : bench.poisoned(dtype, {kVectors, to});
  if (up) {
    backend.cosine_up({.out = out}, in.tensor, p, 1.0f);
  } else {
    backend.cosine_down(out, in.tensor, {}, p);
  }
  Comparison comparison;
  for (const int64_t v : spread(kVectors, 5)) {
    std::vector<double> vector;
    for (int64_t i = 0; i < from; ++i) vector.push_back(of_rows ? in.at(i, v) : in.at(v, i));
    for (const int64_t o : spread(to, 50)) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < from; ++i) {
        const double product = vector[static_cast<size_t>(i)] * (up ? weight(i, o) : weight(o, i));
        sum += product, size += std::abs(product);
      }
      comparison.add(of_rows ? bench.read(out, o)[static_cast<size_t>(v)] : bench.read(out, v)[static_cast<size_t>(o)],
                     sum, size);
    }
  }
  comparison.require(bench.all_finite(out));
  return comparison.allowing(rounding_of(dtype));
}

// About 1 each.
struct Factors {
  Tensor tensor;
  std::vector<double> numbers;
  Factors(CheckBench& bench, Backend& backend, int64_t count) {
    const RandomMatrix random = bench.normal(DType::kF32, 1, count);
    tensor = random.tensor.view({count});
    backend.fill_normal(tensor, 1.0f, 0.1f, random.key);
    for (const double x : random.row(0)) numbers.push_back(1 + 0.1 * x);
  }
};

DType second_moment_dtype(const CheckShapes& s) { return s.states == DType::kI8 ? DType::kU8 : DType::kF32; }

// The scale of a number that is kept in blocks of 8 bits is that of its block.
double size_of(DType dtype, double number) { return dtype == DType::kI8 ? 1 : std::abs(number); }
double rounding_of_state(DType dtype) { return dtype == DType::kI8 ? 0.01 : rounding_of(dtype); }

// With the scaled projections that are made beside it. `in_pieces`: of two halves of the gradient.
Difference factored_second_moment(Backend& backend, const CheckShapes& s, bool in_pieces) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix grad = bench.normal(s.gradients, rows, cols);
  constexpr double kBeta2 = 0.9;
  constexpr float kEps1 = 1e-30f;
  const Tensor row = bench.filled(DType::kF32, {rows}, kMomentum), col = bench.filled(DType::kF32, {cols}, kMomentum);
  const Tensor row_scale = bench.poisoned(DType::kF32, {rows}), col_scale = bench.poisoned(DType::kF32, {cols});
  const Tensor squares = bench.poisoned(DType::kF32, {1});
  const StepScalars* const scalars = bench.upload(step_3());
  const int64_t rank = std::min(s.rank, cols);
  const DType projected = s.activations == DType::kBF16 ? DType::kBF16 : s.gradients;
  ScaledProjection projection;
  if (in_pieces) {
    for (const auto& [begin, count] : {std::pair{int64_t{0}, rows / 2}, {rows / 2, rows - rows / 2}})
      backend.factored_squares(row_scale.slice(begin, count), col_scale, grad.tensor.slice(begin, count), kEps1,
                               begin > 0);
    backend.factored_scales(row, col, row_scale, col_scale, scalars);
  } else {
    if (rank > 0)
      projection = {.plain = bench.poisoned(projected, {rank, cols}),
                    .scaled = bench.poisoned(projected, {rank, cols}),
                    .kind = s.projection,
                    .key = {.seed = 3, .tensor = 5},
                    .index = &scalars->step};
    backend.factored_second_moment(row, col, row_scale, col_scale, grad.tensor, kEps1, scalars,
                                   {squares.as<float>(), false}, rank > 0 ? &projection : nullptr);
  }
  std::vector<double> of_rows(static_cast<size_t>(rows)), of_cols(static_cast<size_t>(cols));
  double all = 0, mean = 0;
  for (size_t i = 0; i < of_rows.size(); ++i) {
    const std::vector<double> g = grad.row(static_cast<int64_t>(i));
    for (size_t j = 0; j < g.size(); ++j) of_rows[i] += g[j] * g[j], of_cols[j] += g[j] * g[j];
  }
  for (double& x : of_rows) {
    all += x;
    x = kBeta2 * kMomentum + (1 - kBeta2) * x / static_cast<double>(cols);
    mean += x / static_cast<double>(rows);
  }
  Comparison comparison;
  const std::vector<double> new_row = bench.read(row, 0), new_col = bench.read(col, 0);
  const std::vector<double> by_row = bench.read(row_scale, 0), by_col = bench.read(col_scale, 0);
  for (size_t i = 0; i < of_rows.size(); ++i) {
    comparison.add(new_row[i], of_rows[i], 0);
    comparison.add(by_row[i], 1 / std::sqrt(of_rows[i] / mean), 0);
  }
  for (size_t j = 0; j < of_cols.size(); ++j) {
    const double x = kBeta2 * kMomentum + (1 - kBeta2) * of_cols[j] / static_cast<double>(rows);
    comparison.add(new_col[j], x, 0);
    comparison.add(by_col[j], 1 / std::sqrt(x), 0);
  }
  if (!in_pieces) comparison.add(bench.read(squares, 0)[0], all, 0);
  if (projection.plain.empty()) return comparison.allowing(1e-4);
  const Tensor alone = bench.poisoned(projected, {rank, cols});
  backend.generate_projection(alone, s.projection, projection.key, &scalars->step);
  for (const int64_t k : spread(rank, 16)) {
    const std::vector<double> expected = bench.read(alone, k), plain = bench.read(projection.plain, k),
                              scaled = bench.read(projection.scaled, k);
    for (size_t j = 0; j < plain.size(); ++j) {
      comparison.add(plain[j], expected[j], 0);
      comparison.add(scaled[j], expected[j] * by_col[j], 0);
    }
  }
  comparison.require(bench.all_finite(projection.plain) && bench.all_finite(projection.scaled));
  return comparison.allowing(std::max(1e-4, rounding_of(projected)));
}

Difference scale_rows_cols(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix in = bench.normal(s.gradients, rows, cols);
  const RandomMatrix by_row = bench.normal(DType::kF32, 1, rows), by_col = bench.normal(DType::kF32, 1, cols);
  const Tensor out = bench.poisoned(s.gradients, {rows, cols});
  backend.scale_rows_cols({out, in.tensor, by_row.tensor.view({rows}), by_col.tensor.view({cols}), 0.5f});
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

// The update of an uncompressed momentum: scaled, averaged, and its squares.
Difference scaled_momentum_update(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix update = bench.normal(s.gradients, rows, cols);
  const Factors by_row(bench, backend, rows), by_col(bench, backend, cols);
  const Tensor momentum = bench.filled(s.states, {rows, cols}, kMomentum), squares = bench.poisoned(DType::kF32, {1});
  backend.scaled_momentum_update(update.tensor, momentum, by_row.tensor, by_col.tensor, 0.9f, bench.upload(step_3()),
                                 {squares.as<float>(), false});
  const Tensor kept = bench.poisoned(DType::kF32, {rows, cols});
  backend.dequantize(kept, momentum);
  Comparison comparison;
  for (const int64_t row : spread(rows, 8)) {
    const std::vector<double> u = update.row(row), result = bench.read(update.tensor, row), m = bench.read(kept, row);
    for (size_t c = 0; c < u.size(); ++c) {
      const double added = 0.1 * u[c] * by_row.numbers[static_cast<size_t>(row)] * by_col.numbers[c];
      const double expected = 0.9 * kMomentum + added, size = 0.9 * kMomentum + std::abs(added);
      comparison.add(result[c], expected, size);
      comparison.add(m[c], expected, std::max(size, size_of(s.states, expected)));
    }
  }
  comparison.require(bench.all_finite(kept));
  comparison.add(bench.read(squares, 0)[0], bench.squares({&update.tensor, 1}), 0);
  return comparison.allowing(std::max(rounding_of(s.gradients), rounding_of_state(s.states)));
}

// A compressed momentum, alone or beside the update of a weight.
Difference ema(Backend& backend, const CheckShapes& s, bool beside) {
  CheckBench bench(backend);
  const int64_t rows = s.rank > 0 ? std::min(s.rank, rows_of(s)) : rows_of(s), cols = cols_of(s);
  const RandomMatrix in = bench.normal(DType::kF32, rows, cols);
  const Factors by_row(bench, backend, rows), by_col(bench, backend, cols);
  const MomentumAverage average = {.momentum = bench.filled(s.states, {rows, cols}, kMomentum),
                                   .in = in.tensor,
                                   .row_scale = by_row.tensor,
                                   .col_scale = by_col.tensor,
                                   .beta1 = 0.9f};
  const StepScalars* const scalars = bench.upload(step_3());
  if (beside) {
    const Tensor weight = bench.filled(DType::kF32, {rows, cols}, 1.0f),
                 update = bench.filled(s.gradients, {rows, cols}, 1.0f);
    backend.apply_update(weight, {}, update, {.clip = 0.0f}, nullptr, nullptr, rows * cols, {}, scalars, &average);
  } else {
    backend.ema(average, scalars);
  }
  const Tensor kept = bench.poisoned(DType::kF32, {rows, cols});
  backend.dequantize(kept, average.momentum);
  Comparison comparison;
  for (const int64_t row : spread(rows, 8)) {
    const std::vector<double> x = in.row(row), m = bench.read(kept, row);
    for (size_t c = 0; c < x.size(); ++c) {
      const double added = 0.1 * x[c] * by_row.numbers[static_cast<size_t>(row)] * by_col.numbers[c];
      const double expected = 0.9 * kMomentum + added;
      comparison.add(m[c], expected, std::max(0.9 * kMomentum + std::abs(added), size_of(s.states, expected)));
    }
  }
  comparison.require(bench.all_finite(kept));
  return comparison.allowing(rounding_of_state(s.states));
}

// ---- weights

// What a step has made of a weight: less lr (step + decay w).
void compare_weights(Comparison& comparison, CheckBench& bench, const RandomMatrix& weight, int64_t row,
                     const std::vector<double>& step) {
  const std::vector<double> w = weight.row(row), result = bench.read(weight.tensor, row);
  for (size_t c = 0; c < w.size(); ++c)
    comparison.add(result[c] - w[c], -0.01 * (step[c] + kDecay * w[c]), 0.01 * (std::abs(step[c]) + std::abs(w[c])));
}

Difference apply_update(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s), cols = cols_of(s);
  const RandomMatrix weight = bench.normal(DType::kF32, rows, cols), update = bench.normal(s.gradients, rows, cols);
  const Tensor squares = bench.filled(DType::kF32, {1}, static_cast<float>(4 * rows * cols));  // rms 2, clipped to 1
  backend.apply_update(weight.tensor, {}, update.tensor, {.weight_decay = kDecay, .clip = 1.0f}, squares.as<float>(),
                       nullptr, rows * cols, {}, bench.upload(step_3()));
  Comparison comparison;
  for (const int64_t row : spread(rows, 8)) {
    std::vector<double> step = update.row(row);
    for (double& u : step) u /= 2;
    compare_weights(comparison, bench, weight, row, step);
  }
  comparison.require(bench.all_finite(weight.tensor));
  return comparison.allowing(1e-3);
}

// The updates that parameters have one by one (a matrix) or together (vectors of a layer). run(parameters, scalars,
// squares) makes them; formula(gradients) is what then goes into some weights, lr and decay aside.
template <typename Run, typename Formula>
Difference parameter_update(Backend& backend, const CheckShapes& s, bool together, double allowed, Run&& run,
                            Formula&& formula) {
  CheckBench bench(backend);
  const int64_t rows = together ? 1 : rows_of(s);
  const DType states = together && s.states == DType::kI8 ? DType::kF32 : s.states;
  std::vector<RandomMatrix> weights, gradients;
  std::vector<ParameterUpdate> updates;
  std::vector<Tensor> tensors;
  for (const int64_t cols :
       together ? std::vector<int64_t>{s.channels, 4 * s.channels, s.channels} : std::vector<int64_t>{cols_of(s)}) {
    weights.push_back(bench.normal(DType::kF32, rows, cols));
    gradients.push_back(bench.normal(s.gradients, rows, cols));
    updates.push_back(
        {.weight = weights.back().tensor,
         .momentum = bench.filled(states, {rows, cols}, kMomentum),
         .second_moment = bench.filled(together ? DType::kF32 : second_moment_dtype(s), {rows, cols}, kSecondMoment),
         .grad = gradients.back().tensor,
         .weight_decay = kDecay});
    tensors.push_back(gradients.back().tensor);
  }
  Comparison comparison;
  const Tensor squares = bench.poisoned(DType::kF32, {1});
  const double before = bench.squares(tensors);
  run(updates, bench.upload(step_3()), SquaresTarget{squares.as<float>(), false});
  comparison.add(bench.read(squares, 0)[0], before, 0);
  for (size_t i = 0; i < weights.size(); ++i) {
    for (const int64_t row : spread(rows, 8))
      compare_weights(comparison, bench, weights[i], row, formula(gradients[i].row(row)));
    comparison.require(bench.all_finite(weights[i].tensor));
  }
  return comparison.allowing(allowed);
}

Difference adamw_update(Backend& backend, const CheckShapes& s, bool together) {
  const auto run = [&](const auto& updates, const StepScalars* scalars, SquaresTarget squares) {
    backend.adamw_update(updates, {}, scalars, squares);
  };
  return parameter_update(backend, s, together, 1e-3, run, [](std::vector<double> g) {
    const StepScalars scalars = step_3();
    for (double& x : g) {
      const double m = 0.9 * kMomentum + 0.1 * x, v = 0.95 * kSecondMoment + 0.05 * x * x;
      x = m / static_cast<double>(scalars.bias_correction1) /
          (std::sqrt(v / static_cast<double>(scalars.bias_correction2)) + 1e-8);
    }
    return g;
  });
}

Difference sgd_update(Backend& backend, const CheckShapes& s, bool together) {
  const auto run = [&](const auto& updates, const StepScalars* scalars, SquaresTarget squares) {
    backend.sgd_update(updates, 0.9f, scalars, squares);
  };
  return parameter_update(backend, s, together, 1e-3, run, [](std::vector<double> g) {
    for (double& x : g) x += 0.9 * kMomentum;
    return g;
  });
}

// Clipped to a tenth.
Difference unfactored_update(Backend& backend, const CheckShapes& s) {
  const auto run = [&](const auto& updates, const StepScalars* scalars, SquaresTarget squares) {
    backend.unfactored_update(updates, {.beta1 = 0.9f, .clip = 0.1f}, scalars, squares);
  };
  return parameter_update(backend, s, true, rounding_of(s.gradients), run, [](std::vector<double> g) {
    double squares = 0;
    for (double& x : g) {
      x = 0.9 * kMomentum + 0.1 * x / std::sqrt(0.9 * kSecondMoment + 0.1 * x * x);
      squares += x * x;
    }
    const double rms = std::sqrt(squares / static_cast<double>(g.size()));
    for (double& x : g) x /= std::max(1.0, rms / 0.1);
    return g;
  });
}

}  // namespace

std::vector<Check> update_checks(const CheckShapes& s) {
  std::vector<Check> checks;
  const std::string matrix = shape_text({rows_of(s), cols_of(s)}) + " ";
  const auto add = [&](const char* operation, const std::string& shape, auto function, auto... options) {
    checks.push_back({operation, shape, [=](Backend& backend) { return function(backend, s, options...); }});
  };
  const std::string of_gradients = matrix + dtype_name(s.gradients),
                    with_states = std::string(" and ") + dtype_name(s.states);
  const std::string vectors = "vectors of " + std::to_string(s.channels) + " " + dtype_name(s.gradients);
  const std::string factored = of_gradients + " rank " + std::to_string(s.rank);
  const bool projects = s.rank > 0 && s.rank < s.channels;
  if (projects) add("generate_projection", shape_text({s.rank, s.channels}) + " fp32", projection);
  add("factored_second_moment", factored, factored_second_moment, false);
  add("factored_scales", of_gradients, factored_second_moment, true);
  add("scale_rows_cols", of_gradients, scale_rows_cols);
  add("scaled_momentum_update", of_gradients + with_states, scaled_momentum_update);
  add("ema", factored + with_states, ema, false);
  add("apply_update", of_gradients, apply_update);
  add("apply_update", factored + with_states + " momentum", ema, true);
  add("unfactored_update", vectors + with_states, unfactored_update);
  for (const bool together : {false, true}) {
    const std::string shape = (together ? vectors : of_gradients) + with_states;
    add("adamw_update", shape, adamw_update, together);
    add("sgd_update", shape, sgd_update, together);
  }
  if (!projects) return checks;
  if (s.transforms) {
    for (const bool of_rows : {false, true}) {
      const std::string shape = std::string(of_rows ? "columns" : "rows") + " of " + std::to_string(s.channels) + " " +
                                dtype_name(s.gradients) + " rank " + std::to_string(s.rank);
      add("cosine_down", shape, cosine_transform, false, of_rows);
      add("cosine_up", shape, cosine_transform, true, of_rows);
    }
  }
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
