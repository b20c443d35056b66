// test_no_blas.cpp: the functions that stand in for a CBLAS in a build without one, against plain loops in float64.
// They are C++ functions, so they live beside the CBLAS that this test's library uses.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/cpu/no_blas/cblas.h"

namespace {

template <typename T>
std::vector<T> random_values(size_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<T> normal(0, 1);
  std::vector<T> values(count);
  for (T& value : values) value = normal(generator);
  return values;
}

template <typename T>
double relative_error(const std::vector<T>& out, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(out[i]) - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

TEST(NoBlas, Sgemm) {
  struct Size {
    int m, n, k;
  };
  for (const Size s : {Size{1, 1, 1}, {7, 33, 300}, {64, 64, 64}, {9, 1100, 17}, {130, 31, 513}}) {
    for (const bool transpose_a : {false, true}) {
      for (const bool transpose_b : {false, true}) {
        for (const float beta : {0.0f, 1.0f, -0.5f}) {
          const int lda = (transpose_a ? s.m : s.k) + 3, ldb = (transpose_b ? s.k : s.n) + 1, ldc = s.n + 2;
          const auto a = random_values<float>(static_cast<size_t>((transpose_a ? s.k : s.m) * lda), 1);
          const auto b = random_values<float>(static_cast<size_t>((transpose_b ? s.n : s.k) * ldb), 2);
          auto c = random_values<float>(static_cast<size_t>(s.m * ldc), 3);
          if (beta == 0.0f) std::fill(c.begin(), c.end(), NAN);  // must not be read
          std::vector<double> expected(c.size(), 0);
          std::vector<float> compared(c.size(), 0.0f);
          for (int i = 0; i < s.m; ++i) {
            for (int j = 0; j < s.n; ++j) {
              double sum = 0;
              for (int p = 0; p < s.k; ++p)
                sum += static_cast<double>(a[static_cast<size_t>(transpose_a ? p * lda + i : i * lda + p)]) *
                       static_cast<double>(b[static_cast<size_t>(transpose_b ? j * ldb + p : p * ldb + j)]);
              const size_t at = static_cast<size_t>(i * ldc + j);
              expected[at] = 1.5 * sum + (beta == 0.0f ? 0.0 : static_cast<double>(beta * c[at]));
            }
          }
          const CBLAS_TRANSPOSE op_a = transpose_a ? CblasTrans : CblasNoTrans;
          const CBLAS_TRANSPOSE op_b = transpose_b ? CblasTrans : CblasNoTrans;
          cblas_sgemm(CblasRowMajor, op_a, op_b, s.m, s.n, s.k, 1.5f, a.data(), lda, b.data(), ldb, beta, c.data(),
                      ldc);
          for (int i = 0; i < s.m; ++i)
            for (int j = 0; j < s.n; ++j)
              compared[static_cast<size_t>(i * ldc + j)] = c[static_cast<size_t>(i * ldc + j)];
          EXPECT_LE(relative_error(compared, expected), 1e-5) << s.m << " x " << s.n << " x " << s.k;
        }
      }
    }
  }
}

// A column-major product is the row-major one of the transposed matrices.
TEST(NoBlas, SgemmInColumnMajorOrder) {
  const int m = 5, n = 4, k = 3;
  const auto a = random_values<float>(m * k, 1), b = random_values<float>(k * n, 2);
  std::vector<float> c(m * n, NAN);
  cblas_sgemm(CblasColMajor, CblasNoTrans, CblasTrans, m, n, k, 1.0f, a.data(), m, b.data(), n, 0.0f, c.data(), m);
  std::vector<double> expected(c.size());
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j)
      for (int p = 0; p < k; ++p)
        expected[static_cast<size_t>(j * m + i)] += static_cast<double>(a[static_cast<size_t>(p * m + i)]) *
                                                    static_cast<double>(b[static_cast<size_t>(p * n + j)]);
  EXPECT_LE(relative_error(c, expected), 1e-6);
}

TEST(NoBlas, Sgemv) {
  const int m = 37, n = 70, lda = 71;
  const auto a = random_values<float>(m * lda, 1), x = random_values<float>(3 * n, 2),
             start = random_values<float>(n, 3);
  for (const bool transpose : {false, true}) {
    const int outputs = transpose ? n : m, inputs = transpose ? m : n, stride = 3;
    std::vector<float> y(start.begin(), start.begin() + outputs);
    std::vector<double> expected(y.begin(), y.end());
    for (int j = 0; j < outputs; ++j) {
      expected[static_cast<size_t>(j)] *= 0.5;
      for (int i = 0; i < inputs; ++i)
        expected[static_cast<size_t>(j)] +=
            2.0 * static_cast<double>(a[static_cast<size_t>(transpose ? i * lda + j : j * lda + i)]) *
            static_cast<double>(x[static_cast<size_t>(i * stride)]);
    }
    cblas_sgemv(CblasRowMajor, transpose ? CblasTrans : CblasNoTrans, m, n, 2.0f, a.data(), lda, x.data(), stride, 0.5f,
                y.data(), 1);
    EXPECT_LE(relative_error(y, expected), 1e-6) << transpose;
  }
}

}  // namespace
