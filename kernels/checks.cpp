// checks.cpp: the operations of a model's passes against their formulas; see checks.h.
#include "kernels/checks.h"

#include <cmath>
#include <random>

#include "kernels/check_bench.h"

namespace {

constexpr int64_t kMostNumbers = int64_t{1} << 22;  // of operations whose rows are independent, or nearly so

std::string with_dtype(std::initializer_list<int64_t> shape, DType dtype) {
  return shape_text(shape) + " " + dtype_name(dtype);
}

int64_t rows_of(const CheckShapes& s, int64_t cols) {
  return std::min(s.batch * s.sequence, std::max<int64_t>(kMostNumbers / cols, 64));
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocabulary) {
  std::mt19937 generator(1);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(generator() % static_cast<uint64_t>(vocabulary));
  return tokens;
}

// As the host groups a batch for the embedding's backward pass.
struct Groups {
  std::vector<int32_t> ids, starts, positions;

  Groups(const std::vector<int32_t>& tokens, int64_t vocabulary)
      : ids(tokens.size(), -1), starts(tokens.size() + 1, static_cast<int32_t>(tokens.size())) {
    size_t group = 0;
    for (int32_t id = 0; id < vocabulary; ++id) {
      const size_t begin = positions.size();
      for (size_t i = 0; i < tokens.size(); ++i)
        if (tokens[i] == id) positions.push_back(static_cast<int32_t>(i));
      if (positions.size() == begin) continue;
      ids[group] = id;
      starts[group++] = static_cast<int32_t>(begin);
    }
  }
};

// ---- embedding

Difference embedding(Backend& backend, const CheckShapes& s, bool backward) {
  CheckBench bench(backend);
  const int64_t C = s.channels, T = std::min<int64_t>(s.sequence, 256), B = std::min<int64_t>(s.batch, 2);
  const int64_t V = std::min<int64_t>(s.vocabulary, 1000);
  const std::vector<int32_t> ids = random_tokens(B * T, V);
  const Tensor tokens = bench.upload(ids).view({B, T});
  Comparison comparison;
  if (!backward) {
    const RandomMatrix wte = bench.normal(s.weights, V, C), wpe = bench.normal(s.weights, T, C);
    const Tensor out = bench.poisoned(s.activations, {B, T, C});
    backend.embedding_forward(out, tokens, wte.tensor, wpe.tensor);
    for (const int64_t row : spread(B * T, 16)) {
      const std::vector<double> a = wte.row(ids[static_cast<size_t>(row)]), b = wpe.row(row % T);
      const std::vector<double> result = bench.read(out, row);
      for (size_t c = 0; c < result.size(); ++c)
        comparison.add(result[c], a[c] + b[c], std::abs(a[c]) + std::abs(b[c]));
    }
    comparison.require(bench.all_finite(out));
    return comparison.allowing(rounding_of(s.activations));
  }
  const Groups groups(ids, V);
  const RandomMatrix dout = bench.normal(s.activations, B * T, C);
  const Tensor dwte = bench.poisoned(DType::kF32, {V, C}), dwpe = bench.poisoned(s.gradients, {T, C});
  backend.embedding_backward(dwte, false, dwpe, false, dout.tensor.view({B, T, C}),
                             {bench.upload(groups.ids), bench.upload(groups.starts), bench.upload(groups.positions)});
  const auto compare = [&](const Tensor& gradient, int64_t row, const std::function<bool(int64_t)>& adds) {
    std::vector<double> sum(static_cast<size_t>(C)), squares(sum);
    for (int64_t i = 0; i < B * T; ++i) {
      if (!adds(i)) continue;
      const std::vector<double> x = dout.row(i);
      for (size_t c = 0; c < x.size(); ++c) sum[c] += x[c], squares[c] += x[c] * x[c];
    }
    const std::vector<double> result = bench.read(gradient, row);
    for (size_t c = 0; c < sum.size(); ++c) comparison.add(result[c], sum[c], std::sqrt(squares[c]));
  };
  for (const int64_t id : spread(V, 8)) compare(dwte, id, [&](int64_t i) { return ids[static_cast<size_t>(i)] == id; });
  for (const int64_t t : spread(T, 8)) compare(dwpe, t, [&](int64_t i) { return i % T == t; });
  comparison.require(bench.all_finite(dwte) && bench.all_finite(dwpe));
  return comparison.allowing(rounding_of(s.gradients));
}

// ---- LayerNorm

struct NormalizedRow {
  std::vector<double> x;  // normalized
  double mean = 0, rstd = 0;
  explicit NormalizedRow(const std::vector<double>& in) : x(in) {
    double variance = 0;
    for (const double value : in) mean += value / static_cast<double>(in.size());
    for (const double value : in) variance += (value - mean) * (value - mean) / static_cast<double>(in.size());
    rstd = 1 / std::sqrt(variance + 1e-5);
    for (double& value : x) value = (value - mean) * rstd;
  }
};

Difference layernorm(Backend& backend, const CheckShapes& s, bool with_residual) {
  CheckBench bench(backend);
  const int64_t C = s.channels, rows = rows_of(s, C);
  const RandomMatrix a = bench.normal(s.activations, rows, C), b = bench.normal(s.activations, rows, C);
  const RandomMatrix weight = bench.normal(s.weights, 1, C), bias = bench.normal(s.weights, 1, C);
  const Tensor out = bench.poisoned(s.activations, {rows, C}), residual = bench.poisoned(s.activations, {rows, C});
  const Tensor mean = bench.poisoned(DType::kF32, {rows}), rstd = bench.poisoned(DType::kF32, {rows});
  const Tensor w = weight.tensor.view({C}), shift = bias.tensor.view({C});
  if (with_residual) {
    backend.residual_layernorm_forward(residual, out, mean, rstd, a.tensor, b.tensor, w, shift);
  } else {
    backend.layernorm_forward(out, mean, rstd, a.tensor, w, shift);
  }
  Comparison comparison;
  const std::vector<double> means = bench.read(mean, 0), rstds = bench.read(rstd, 0);
  const std::vector<double> scale = weight.row(0), added = bias.row(0);
  for (const int64_t row : spread(rows, 8)) {
    std::vector<double> in = a.row(row);
    if (with_residual) {
      const std::vector<double> other = b.row(row), stored = bench.read(residual, row);
      for (size_t c = 0; c < in.size(); ++c)
        comparison.add(stored[c], in[c] + other[c], std::abs(in[c]) + std::abs(other[c]));
      in = stored;
    }
    const NormalizedRow normalized(in);
    const std::vector<double> result = bench.read(out, row);
    for (size_t c = 0; c < in.size(); ++c) {
      const double x = normalized.x[c] * scale[c];
      comparison.add(result[c], x + added[c], std::abs(x) + std::abs(added[c]));
    }
    comparison.add(means[static_cast<size_t>(row)], normalized.mean, 1);
    comparison.add(rstds[static_cast<size_t>(row)], normalized.rstd, 0);
  }
  comparison.require(bench.all_finite(out) && (!with_residual || bench.all_finite(residual)));
  return comparison.allowing(rounding_of(s.activations));
}

Difference layernorm_backward(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t C = s.channels, rows = rows_of(s, C);
  const RandomMatrix in = bench.normal(s.activations, rows, C), dout = bench.normal(s.activations, rows, C);
  const RandomMatrix din = bench.normal(s.activations, rows, C), weight = bench.normal(s.weights, 1, C);
  const Tensor out = bench.poisoned(s.activations, {rows, C}), w = weight.tensor.view({C});
  const Tensor mean = bench.poisoned(DType::kF32, {rows}), rstd = bench.poisoned(DType::kF32, {rows});
  const Tensor dweight = bench.poisoned(s.gradients, {C}), dbias = bench.poisoned(s.gradients, {C});
  backend.layernorm_forward(out, mean, rstd, in.tensor, w, w);
  backend.layernorm_backward(din.tensor, dweight, dbias, false, dout.tensor, in.tensor, mean, rstd, w);
  Comparison comparison;
  const size_t width = static_cast<size_t>(C);
  const std::vector<double> scale = weight.row(0);
  std::vector<double> sum_weight(width), sum_bias(width), size_weight(width), size_bias(width);
  for (int64_t row = 0; row < rows; ++row) {
    const NormalizedRow normalized(in.row(row));
    const std::vector<double> d = dout.row(row);
    for (size_t c = 0; c < width; ++c) {
      const double term = d[c] * normalized.x[c];
      sum_weight[c] += term, size_weight[c] += term * term;
      sum_bias[c] += d[c], size_bias[c] += d[c] * d[c];
    }
    if (row % std::max<int64_t>(rows / 8, 1) != 0 && row + 1 != rows) continue;
    double mean_g = 0, mean_gx = 0;
    for (size_t c = 0; c < width; ++c) {
      mean_g += d[c] * scale[c] / static_cast<double>(C);
      mean_gx += d[c] * scale[c] * normalized.x[c] / static_cast<double>(C);
    }
    const std::vector<double> before = din.row(row), result = bench.read(din.tensor, row);
    for (size_t c = 0; c < width; ++c) {
      const double g = d[c] * scale[c];
      comparison.add(result[c], before[c] + normalized.rstd * (g - mean_g - normalized.x[c] * mean_gx),
                     std::abs(before[c]) + normalized.rstd * (std::abs(g) + std::abs(mean_g) + std::abs(mean_gx)));
    }
  }
  const std::vector<double> of_weight = bench.read(dweight, 0), of_bias = bench.read(dbias, 0);
  for (size_t c = 0; c < width; ++c) {
    comparison.add(of_weight[c], sum_weight[c], std::sqrt(size_weight[c]));
    comparison.add(of_bias[c], sum_bias[c], std::sqrt(size_bias[c]));
  }
  comparison.require(bench.all_finite(din.tensor));
  return comparison.allowing(std::max(rounding_of(s.activations), rounding_of(s.gradients)));
}

// ---- elementwise, sums

Difference gelu_forward(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t cols = 4 * s.channels, rows = rows_of(s, cols);
  const RandomMatrix in = bench.normal(s.activations, rows, cols);
  const Tensor out = bench.poisoned(s.activations, {rows, cols});
  backend.gelu_forward(out, in.tensor);
  Comparison comparison;
  for (const int64_t row : spread(rows, 8)) {
    const std::vector<double> x = in.row(row), result = bench.read(out, row);
    for (size_t c = 0; c < x.size(); ++c) {
      const double t = std::tanh(std::sqrt(2 / M_PI) * (x[c] + 0.044715 * x[c] * x[c] * x[c]));
      comparison.add(result[c], 0.5 * x[c] * (1 + t), std::abs(x[c]));
    }
  }
  comparison.require(bench.all_finite(out));
  return comparison.allowing(rounding_of(s.activations));
}

Difference gelu_backward(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t cols = 4 * s.channels, rows = rows_of(s, cols);
  const RandomMatrix in = bench.normal(s.activations, rows, cols), d = bench.normal(s.activations, rows, cols);
  const Tensor dbias = bench.poisoned(s.gradients, {cols});
  backend.gelu_backward(d.tensor, dbias, in.tensor, false);
  const auto slope = [](double x) {
    const double root = std::sqrt(2 / M_PI), t = std::tanh(root * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x);
  };
  Comparison comparison;
  for (const int64_t row : spread(rows, 8)) {
    const std::vector<double> x = in.row(row), before = d.row(row), result = bench.read(d.tensor, row);
    for (size_t c = 0; c < x.size(); ++c) comparison.add(result[c], before[c] * slope(x[c]), std::abs(before[c]));
  }
  const std::vector<double> sums = bench.read(dbias, 0);
  for (const int64_t column : spread(cols, 16)) {
    double sum = 0, squares = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const double x = d.at(row, column) * slope(in.at(row, column));
      sum += x, squares += x * x;
    }
    comparison.add(sums[static_cast<size_t>(column)], sum, std::sqrt(squares));
  }
  comparison.require(bench.all_finite(d.tensor));
  comparison.require(bench.all_finite(dbias));
  return comparison.allowing(std::max(rounding_of(s.activations), rounding_of(s.gradients)));
}

Difference bias_backward(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t cols = 3 * s.channels, rows = rows_of(s, cols);
  const RandomMatrix dout = bench.normal(s.activations, rows, cols);
  const Tensor dbias = bench.poisoned(s.gradients, {cols});
  backend.bias_backward(dbias, dout.tensor, false);
  Comparison comparison;
  const std::vector<double> result = bench.read(dbias, 0);
  for (const int64_t column : spread(cols, 16)) {
    double sum = 0, squares = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const double x = dout.at(row, column);
      sum += x, squares += x * x;
    }
    comparison.add(result[static_cast<size_t>(column)], sum, std::sqrt(squares));
  }
  comparison.require(bench.all_finite(dbias));
  return comparison.allowing(rounding_of(s.gradients));
}

// The numbers that all other checks begin with, and the sum that tells them whether all of a result was written.
Difference fill_normal(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s, s.channels);
  const RandomMatrix x = bench.normal(s.activations, rows, s.channels);
  Comparison comparison;
  for (const int64_t row : spread(rows, 32)) {
    const std::vector<double> result = bench.read(x.tensor, row), expected = x.row(row);
    for (size_t c = 0; c < result.size(); ++c) comparison.add(result[c], expected[c], 0);
  }
  return comparison.allowing(s.activations == DType::kBF16 ? 0.008 : 1e-6);  // one unit in the last place
}

Difference sum_squares(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s, s.channels);
  const RandomMatrix x = bench.normal(s.activations, rows, s.channels);
  const Tensor out = bench.poisoned(DType::kF32, {1});
  backend.sum_squares(out, x.tensor, false);
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (const double value : x.row(row)) sum += value * value;
  Comparison comparison;
  comparison.add(bench.read(out, 0)[0], sum, 0);
  return comparison.allowing(1e-5);
}

// Both tensors become half of what they were, at once or by their norms.
Difference scale(Backend& backend, const CheckShapes& s, bool of_norms) {
  CheckBench bench(backend);
  const RandomMatrix x[] = {bench.normal(s.gradients, 3, s.channels), bench.normal(s.gradients, 1, 4 * s.channels)};
  const Tensor both[] = {x[0].tensor, x[1].tensor}, one = bench.filled(DType::kF32, {1}, 1.0f);
  const Tensor half = bench.filled(DType::kF32, {1}, 0.5f), quarter = bench.filled(DType::kF32, {1}, 0.25f);
  if (of_norms) {
    for (const Tensor& t : both) backend.restore_norm(t, quarter.as<float>(), one.as<float>());
  } else {
    backend.scale(both, half.as<float>());
  }
  Comparison comparison;
  for (const RandomMatrix& m : x) {
    for (int64_t row = 0; row < m.tensor.rows(); ++row) {
      const std::vector<double> result = bench.read(m.tensor, row), before = m.row(row);
      for (size_t c = 0; c < result.size(); ++c) comparison.add(result[c], before[c] / 2, 0);
    }
  }
  return comparison.allowing(rounding_of(s.gradients));
}

Difference convert(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t rows = rows_of(s, s.channels);
  const RandomMatrix x = bench.normal(DType::kF32, rows, s.channels);
  const Tensor out = bench.poisoned(DType::kBF16, {rows, s.channels});
  backend.convert(out, x.tensor);
  Comparison comparison;
  for (const int64_t row : spread(rows, 32)) {
    const std::vector<double> result = bench.read(out, row), expected = x.row(row);
    for (size_t c = 0; c < result.size(); ++c) comparison.add(result[c], expected[c], 0);
  }
  comparison.require(bench.all_finite(out));
  return comparison.allowing(0.004);
}

// ---- classifier

// `by_columns`: losses first, then the gradient of some columns after another.
Difference classifier(Backend& backend, const CheckShapes& s, bool by_columns) {
  CheckBench bench(backend);
  const int64_t rows = std::min<int64_t>(s.head_chunk, 128), V = s.vocabulary;
  const RandomMatrix logits = bench.normal(s.activations, rows, s.padded_vocabulary);
  const std::vector<int32_t> targets = random_tokens(rows, V);
  const Tensor losses = bench.poisoned(DType::kF32, {rows});
  constexpr float kScale = 0.5f;
  const Tensor uploaded = bench.upload(targets);
  if (by_columns) {
    const Tensor lse = bench.poisoned(DType::kF32, {rows});
    backend.classifier(losses, logits.tensor, uploaded, V, kScale, false, lse);
    const int64_t first = s.padded_vocabulary / 16 * 8;
    for (const auto& [begin, count] : {std::pair{int64_t{0}, first}, {first, s.padded_vocabulary - first}})
      backend.classifier_gradient(logits.tensor.columns(begin, count), uploaded, lse, begin, V, kScale);
  } else {
    backend.classifier(losses, logits.tensor, uploaded, V, kScale, true);
  }
  Comparison comparison;
  const std::vector<double> loss = bench.read(losses, 0);
  for (const int64_t row : spread(rows, 6)) {
    const std::vector<double> x = logits.row(row), result = bench.read(logits.tensor, row);
    double sum = 0;
    for (int64_t v = 0; v < V; ++v) sum += std::exp(x[static_cast<size_t>(v)]);
    const int64_t target = targets[static_cast<size_t>(row)];
    comparison.add(loss[static_cast<size_t>(row)], std::log(sum) - x[static_cast<size_t>(target)], std::log(sum));
    for (int64_t v = 0; v < s.padded_vocabulary; ++v) {
      const double probability = v < V ? std::exp(x[static_cast<size_t>(v)]) / sum : 0;
      comparison.add(result[static_cast<size_t>(v)], kScale * (probability - (v == target ? 1 : 0)),
                     1e-3 / static_cast<double>(V));
    }
  }
  comparison.require(bench.all_finite(logits.tensor));
  return comparison.allowing(s.activations == DType::kBF16 ? 0.02 : 1e-3);
}

}  // namespace

std::string shape_text(std::initializer_list<int64_t> shape) {
  std::string text;
  for (const int64_t extent : shape) text += (text.empty() ? "[" : ",") + std::to_string(extent);
  return text + "]";
}

std::vector<Check> model_checks(const CheckShapes& s) {
  std::vector<Check> checks;
  const auto add = [&](const char* operation, const std::string& shape, auto function, auto... options) {
    checks.push_back({operation, shape, [=](Backend& backend) { return function(backend, s, options...); }});
  };
  const int64_t C = s.channels, N = s.batch * s.sequence, Vp = s.padded_vocabulary, chunk = std::min(s.head_chunk, N);
  const DType act = s.activations, f32 = DType::kF32;
  const std::string heads = with_dtype({s.batch, s.sequence, C}, act) + " " + std::to_string(s.heads) + " heads";
  add("fill_normal", with_dtype({rows_of(s, C), C}, act), fill_normal);
  add("sum_squares", with_dtype({rows_of(s, C), C}, act), sum_squares);
  add("scale", with_dtype({4 * C}, s.gradients), scale, false);
  add("restore_norm", with_dtype({4 * C}, s.gradients), scale, true);
  add("convert", shape_text({rows_of(s, C), C}) + " fp32 to bf16", convert);
  add("attention_forward", heads, attention_difference, false);
  add("attention_backward", heads, attention_difference, true);
  add("attention_decode", with_dtype({s.sequence, C}, act) + " " + std::to_string(s.heads) + " heads",
      attention_decode_difference);
  for (const auto& [inputs, outputs] : {std::pair{C, 3 * C}, {C, C}, {C, 4 * C}, {4 * C, C}}) {
    const std::pair<int64_t, int64_t> sides = {inputs, outputs};
    const ProductShape products[] = {
        {.m = N, .n = sides.second, .k = sides.first, .out = act, .a = act, .b = s.weights, .bias = true},
        {.m = N, .n = sides.first, .k = sides.second, .out = act, .a = act, .b = s.weights, .transpose_b = true},
        {.m = sides.first, .n = sides.second, .k = N, .out = s.gradients, .a = act, .b = act, .transpose_a = true}};
    for (const ProductShape& product : products) checks.push_back(product_check(product, s.tf32));
  }
  for (const bool again : {false, true}) {  // the second chunk adds to the first one's gradient
    if (again && chunk == N) continue;
    const ProductShape product = {
        .m = Vp, .n = C, .k = chunk, .out = f32, .a = act, .b = act, .transpose_a = true, .accumulate = again};
    checks.push_back(product_check(product, s.tf32));
  }
  checks.push_back(
      product_check({.m = chunk, .n = Vp, .k = C, .out = act, .a = act, .b = s.weights, .transpose_b = true}, s.tf32));
  checks.push_back(product_check({.m = chunk, .n = C, .k = Vp, .out = act, .a = act, .b = s.weights}, s.tf32));
  const std::string logits = with_dtype({std::min<int64_t>(s.head_chunk, 128), Vp}, act);
  add("classifier", logits, classifier, false);
  add("classifier_gradient", logits, classifier, true);
  const std::string norm = with_dtype({rows_of(s, C), C}, act);
  add("layernorm_forward", norm, layernorm, false);
  add("residual_layernorm_forward", norm, layernorm, true);
  add("layernorm_backward", norm, layernorm_backward);
  add("gelu_forward", with_dtype({rows_of(s, 4 * C), 4 * C}, act), gelu_forward);
  add("gelu_backward", with_dtype({rows_of(s, 4 * C), 4 * C}, act), gelu_backward);
  add("bias_backward", with_dtype({rows_of(s, 3 * C), 3 * C}, act), bias_backward);
  add("embedding_forward", with_dtype({std::min<int64_t>(s.vocabulary, 1000), C}, s.weights), embedding, false);
  add("embedding_backward", with_dtype({std::min<int64_t>(s.vocabulary, 1000), C}, act), embedding, true);
  return checks;
}
