// product_checks.cpp: matrix products and attention against their formulas; see checks.h.
#include <cmath>

#include "kernels/check_bench.h"
#include "kernels/checks.h"

namespace {

using Rows = std::vector<std::vector<double>>;

struct Head {
  int64_t batch, index;
};
std::vector<Head> some_heads(const CheckShapes& s) {
  if (s.batch * s.heads == 1) return {{0, 0}};
  return {{0, 0}, {s.batch - 1, s.heads - 1}};
}

// Columns [column, column + width) of all tokens of a sequence.
Rows tokens_of(const RandomMatrix& m, const CheckShapes& s, const Head& head, int64_t column, int64_t width) {
  Rows rows(static_cast<size_t>(s.sequence));
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < s.sequence; ++t)
    rows[static_cast<size_t>(t)] = m.numbers(head.batch * s.sequence + t, column, width);
  return rows;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Rows of numbers that are sums, and the sums of the squares of their terms.
struct Sums {
  Rows value, squares;
  Sums(size_t rows, size_t cols) : value(rows, std::vector<double>(cols)), squares(value) {}
  void add(size_t row, double factor, double size, const std::vector<double>& x) {
    for (size_t c = 0; c < x.size(); ++c) {
      value[row][c] += factor * x[c];
      squares[row][c] += size * size * x[c] * x[c];
    }
  }
};

// softmax(Q K^T / sqrt(HD)) V of one head, and with the gradient d of its output those of Q, K and V.
struct HeadFormula {
  Sums out, dq, dk, dv;
  std::vector<double> lse;

  HeadFormula(const Rows& q, const Rows& k, const Rows& v, const Rows& d)
      : out(q.size(), q[0].size()), dq(out), dk(out), dv(out), lse(q.size()) {
    const size_t T = q.size();
    const bool backward = !d.empty();
    const double scale = 1 / std::sqrt(static_cast<double>(q[0].size()));
    std::vector<float> p(T * T), ds(backward ? T * T : 0), ds_size(ds);
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t i = 0; i < T; ++i) {
      std::vector<double> exponential(i + 1), dp(i + 1);
      double sum = 0, delta = 0;
      for (size_t j = 0; j <= i; ++j) sum += exponential[j] = std::exp(scale * dot(q[i], k[j]));
      lse[i] = std::log(sum);
      for (size_t j = 0; j <= i; ++j) {
        const double probability = exponential[j] / sum;
        p[i * T + j] = static_cast<float>(probability);
        out.add(i, probability, probability, v[j]);
        if (backward) delta += probability * (dp[j] = dot(d[i], v[j]));
      }
      // dP and delta are sums themselves, and may be small by chance.
      const double d_norm = backward ? std::sqrt(dot(d[i], d[i]) / static_cast<double>(d[i].size())) : 0;
      const double delta_size = std::abs(delta) + d_norm * std::sqrt(dot(out.value[i], out.value[i]));
      for (size_t j = 0; backward && j <= i; ++j) {
        const double factor = scale * exponential[j] / sum;
        const double dp_size = std::abs(dp[j]) + d_norm * std::sqrt(dot(v[j], v[j]));
        ds[i * T + j] = static_cast<float>(factor * (dp[j] - delta));
        ds_size[i * T + j] = static_cast<float>(factor * (dp_size + delta_size));
        dq.add(i, ds[i * T + j], ds_size[i * T + j], k[j]);
      }
    }
    if (!backward) return;
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t j = 0; j < T; ++j) {
      for (size_t i = j; i < T; ++i) {
        dk.add(j, ds[i * T + j], ds_size[i * T + j], q[i]);
        dv.add(j, p[i * T + j], p[i * T + j], d[i]);
      }
    }
  }
};

// Some columns of a contiguous matrix on the device, against the sums of them that it should have come with.
void compare_sums(Comparison& comparison, const CheckBench& bench, const Tensor& matrix, const Tensor& sums) {
  constexpr int64_t kRowsAtOnce = 64;
  const std::vector<int64_t> columns = spread(matrix.cols(), 64);
  std::vector<double> expected(columns.size()), squares(columns.size());
  for (int64_t row = 0; row < matrix.rows(); row += kRowsAtOnce) {
    const std::vector<double> some = bench.read(matrix, row, std::min(kRowsAtOnce, matrix.rows() - row));
    for (size_t first = 0; first < some.size(); first += static_cast<size_t>(matrix.cols())) {
      for (size_t j = 0; j < columns.size(); ++j) {
        const double x = some[first + static_cast<size_t>(columns[j])];
        expected[j] += x, squares[j] += x * x;
      }
    }
  }
  const std::vector<double> result = bench.read(sums, 0);
  for (size_t j = 0; j < columns.size(); ++j)
    comparison.add(result[static_cast<size_t>(columns[j])], expected[j], std::sqrt(squares[j]));
}

}  // namespace

// What whole heads come to. P and dS are kept, [T,T] in fp32, so that rows and columns can be added up in parallel.
Difference attention_difference(Backend& backend, const CheckShapes& s, bool backward) {
  CheckBench bench(backend);
  const int64_t C = s.channels, T = s.sequence, B = s.batch, HD = C / s.heads;
  const RandomMatrix qkv = bench.normal(s.activations, B * T, 3 * C);
  const Tensor out = bench.poisoned(s.activations, {B, T, C}), lse = bench.poisoned(DType::kF32, {B, s.heads, T});
  const int heads = static_cast<int>(s.heads);
  backend.attention_forward(out, lse, qkv.tensor.view({B, T, 3 * C}), heads);
  const RandomMatrix dout = bench.normal(s.activations, backward ? B * T : 1, C);
  const Tensor result = backward ? bench.poisoned(s.activations, {B, T, 3 * C}) : out;
  Comparison comparison;
  if (backward) {
    const Tensor dbias = bench.poisoned(s.gradients, {3 * C});
    backend.attention_backward(result, dbias, dout.tensor.view({B, T, C}), out, lse, qkv.tensor.view({B, T, 3 * C}),
                               heads, false);
    compare_sums(comparison, bench, result, dbias);
    comparison.require(bench.all_finite(dbias));
  }
  for (const Head& head : some_heads(s)) {
    const int64_t column = head.index * HD, first = head.batch * T;
    const HeadFormula formula(tokens_of(qkv, s, head, column, HD), tokens_of(qkv, s, head, C + column, HD),
                              tokens_of(qkv, s, head, 2 * C + column, HD),
                              backward ? tokens_of(dout, s, head, column, HD) : Rows{});
    const auto compare = [&](const std::vector<double>& row, int64_t begin, const Sums& sums, size_t token) {
      for (int64_t c = 0; c < HD; ++c)
        comparison.add(row[static_cast<size_t>(begin + c)], sums.value[token][static_cast<size_t>(c)],
                       std::sqrt(sums.squares[token][static_cast<size_t>(c)]));
    };
    const std::vector<double> log_sums = bench.read(lse, head.batch * s.heads + head.index);
    for (size_t t = 0; t < static_cast<size_t>(T); ++t) {
      const std::vector<double> row = bench.read(result, first + static_cast<int64_t>(t));
      if (backward) {
        compare(row, column, formula.dq, t);
        compare(row, C + column, formula.dk, t);
        compare(row, 2 * C + column, formula.dv, t);
      } else {
        compare(row, column, formula.out, t);
        comparison.add(log_sums[t], formula.lse[t], 1);
      }
    }
  }
  comparison.require(bench.all_finite(result));
  return comparison.allowing(s.activations == DType::kBF16 ? 0.02 : 1e-3);
}

Difference attention_decode_difference(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  CheckShapes one = s;
  one.batch = 1;
  const int64_t C = s.channels, T = s.sequence, HD = C / s.heads;
  const RandomMatrix qkv = bench.normal(s.activations, T, 3 * C);
  const Tensor out = bench.poisoned(s.activations, {C});
  backend.attention_decode(out, qkv.tensor, static_cast<int>(s.heads));
  const std::vector<double> result = bench.read(out, 0);
  Comparison comparison;
  for (const Head& head : some_heads(one)) {
    const int64_t column = head.index * HD;
    const std::vector<double> q = qkv.numbers(T - 1, column, HD);
    const Rows k = tokens_of(qkv, one, head, C + column, HD), v = tokens_of(qkv, one, head, 2 * C + column, HD);
    std::vector<double> exponential;
    double total = 0;
    for (const std::vector<double>& key : k) {
      exponential.push_back(std::exp(dot(q, key) / std::sqrt(static_cast<double>(HD))));
      total += exponential.back();
    }
    Sums sums(1, static_cast<size_t>(HD));
    for (size_t t = 0; t < v.size(); ++t) sums.add(0, exponential[t] / total, exponential[t] / total, v[t]);
    for (int64_t c = 0; c < HD; ++c)
      comparison.add(result[static_cast<size_t>(column + c)], sums.value[0][static_cast<size_t>(c)],
                     std::sqrt(sums.squares[0][static_cast<size_t>(c)]));
  }
  comparison.require(bench.all_finite(out));
  return comparison.allowing(s.activations == DType::kBF16 ? 0.02 : 1e-3);
}

Check product_check(const ProductShape& p, bool tf32) {
  const auto in_memory = [](int64_t rows, int64_t cols, bool transposed) {
    return transposed ? shape_text({cols, rows}) + "^T" : shape_text({rows, cols});
  };
  const std::string shape = in_memory(p.m, p.k, p.transpose_a) + " x " + in_memory(p.k, p.n, p.transpose_b) +
                            (p.bias ? " +bias" : "") + (p.accumulate ? " added" : "") + " " + dtype_name(p.a) +
                            (p.b != p.a ? std::string(" and ") + dtype_name(p.b) : "") +
                            (p.out != p.a ? std::string(" to ") + dtype_name(p.out) : "");
  return {"matmul", shape, [p, tf32](Backend& backend) {
            CheckBench bench(backend);
            const RandomMatrix a = p.transpose_a ? bench.normal(p.a, p.k, p.m) : bench.normal(p.a, p.m, p.k);
            const RandomMatrix b = p.transpose_b ? bench.normal(p.b, p.n, p.k) : bench.normal(p.b, p.k, p.n);
            const RandomMatrix bias = bench.normal(p.out, 1, p.n);
            const RandomMatrix old = bench.normal(p.out, p.accumulate ? p.m : 1, p.n);
            const Tensor out = p.accumulate ? old.tensor : bench.poisoned(p.out, {p.m, p.n});
            backend.matmul(out, a.tensor, b.tensor,
                           {.transpose_a = p.transpose_a,
                            .transpose_b = p.transpose_b,
                            .accumulate = p.accumulate,
                            .bias = p.bias ? bias.tensor.view({p.n}) : Tensor{}});
            const bool in_bf16 = p.a != p.b && backend.name() != "cpu";  // an fp32 operand is rounded
            const auto operand = [&](const RandomMatrix& m, bool across_rows, int64_t index) {
              std::vector<double> x;
              if (across_rows) {
                x = m.row(index);
              } else {
                for (int64_t k = 0; k < p.k; ++k) x.push_back(m.at(k, index));
              }
              for (double& value : x)
                if (in_bf16) value = to_float(from_float<bf16>(static_cast<float>(value)));
              return x;
            };
            const std::vector<int64_t> rows = spread(p.m, 24), columns = spread(p.n, 24);
            std::vector<std::vector<double>> right(columns.size()), left(rows.size());
#pragma omp parallel for schedule(static)
            for (size_t j = 0; j < columns.size(); ++j) right[j] = operand(b, p.transpose_b, columns[j]);
#pragma omp parallel for schedule(static)
            for (size_t i = 0; i < rows.size(); ++i) left[i] = operand(a, !p.transpose_a, rows[i]);
            Comparison comparison;
            for (size_t i = 0; i < rows.size(); ++i) {
              const std::vector<double> result = bench.read(out, rows[i]);
              for (size_t j = 0; j < columns.size(); ++j) {
                double sum = p.bias ? bias.at(0, columns[j]) : 0, squares = sum * sum;
                if (p.accumulate) sum += old.at(rows[i], columns[j]);
                for (size_t k = 0; k < left[i].size(); ++k) {
                  const double term = left[i][k] * right[j][k];
                  sum += term, squares += term * term;
                }
                comparison.add(result[static_cast<size_t>(columns[j])], sum, std::sqrt(squares));
              }
            }
            comparison.require(bench.all_finite(out));
            const bool rounded = tf32 && p.a == DType::kF32 && p.b == DType::kF32;
            return comparison.allowing(p.out == DType::kBF16 ? 0.01 : rounded ? 5e-3 : 1e-3);
          }};
}
