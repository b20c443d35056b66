// test_gemm.cpp: the products that everything on the CPU multiplies with, the library's and our own, in fp32 and in
// bf16, against plain loops in float64: odd sizes, strides, and bits that depend on nothing but the numbers.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/tile_product.h"

namespace {

size_t largest_block = 0;  // of those that a library has asked for

}  // namespace

// Takes the C library's place for oneDNN, which packs operands into blocks of it.
extern "C" int posix_memalign(void** block, size_t alignment, size_t bytes) noexcept {
  largest_block = std::max(largest_block, bytes);
  *block = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  return *block ? 0 : ENOMEM;
}

namespace {

// fp32 numbers that a bf16 holds, 64-byte aligned behind `offset` floats.
class Numbers {
 public:
  Numbers(int64_t count, uint32_t seed, int64_t offset = 0) : values_(static_cast<size_t>(count + offset + 32)) {
    const auto address = reinterpret_cast<uintptr_t>(values_.data());
    first_ = values_.data() + (64 - address % 64) % 64 / sizeof(float) + offset;
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0, 1);
    for (int64_t i = 0; i < count; ++i) first_[i] = to_float(from_float<bf16>(normal(generator)));
  }
  float* data() { return first_; }
  const float* data() const { return first_; }

 private:
  std::vector<float> values_;
  float* first_;
};

std::vector<bf16> narrow(const Numbers& numbers, int64_t count) {
  std::vector<bf16> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = from_float<bf16>(numbers.data()[i]);
  return values;
}

enum class Which { kLibrary, kOurs, kBf16 };

struct Case {
  GemmShape shape;
  float alpha, beta;
  int64_t lda, ldb, ldc;
  int64_t a_count() const { return (shape.transpose_a ? shape.k : shape.m) * lda; }
  int64_t b_count() const { return (shape.transpose_b ? shape.n : shape.k) * ldb; }
};

Case packed(GemmShape s, float alpha = 1.0f, float beta = 0.0f, int64_t more = 0) {
  return {s, alpha, beta, (s.transpose_a ? s.m : s.k) + more, (s.transpose_b ? s.k : s.n) + more, s.n + more};
}

// False where there is no such product.
bool multiply(Which which, const Case& t, const Numbers& a, const Numbers& b, float* c) {
  if (which == Which::kLibrary) {
    gemm(t.shape, t.alpha, a.data(), t.lda, b.data(), t.ldb, t.beta, c, t.ldc);
  } else if (which == Which::kOurs) {
    plain_gemm(t.shape, t.alpha, a.data(), t.lda, b.data(), t.ldb, t.beta, c, t.ldc);
  } else {
    static thread_local Numbers scratch(1 << 20, 9);
    return gemm_bf16(t.shape, t.alpha, narrow(a, t.a_count()).data(), t.lda, narrow(b, t.b_count()).data(), t.ldb,
                     t.beta, c, t.ldc, scratch.data(), sizeof(float) << 20);
  }
  return true;
}

class Gemm : public testing::TestWithParam<Which> {};

TEST_P(Gemm, IsTheSumInFloat64) {
  const Case square = packed({64, 64, 64});
  Numbers result(64 * 64, 3);
  if (!multiply(GetParam(), square, Numbers(64 * 64, 1), Numbers(64 * 64, 2), result.data()))
    GTEST_SKIP() << "no bf16 products on this processor";
  for (const auto& [m, n, k] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1},
                                {1, 50, 77},
                                {7, 33, 300},
                                {64, 64, 64},
                                {9, 1100, 17},
                                {130, 31, 513},
                                {64, 1, 200},
                                {65, 1, 200},
                                {7, 33, 1},
                                {33, 65, 2051}}) {
    for (const bool transpose_a : {false, true}) {
      for (const bool transpose_b : {false, true}) {
        for (const float beta : {0.0f, 1.0f, -0.5f}) {
          if (beta < 0.0f && GetParam() == Which::kBf16) continue;
          const Case t = packed({m, n, k, transpose_a, transpose_b}, 1.5f, beta, m % 4);
          const Numbers a(t.a_count(), 1), b(t.b_count(), 2);
          Numbers c(m * t.ldc, 3);
          std::vector<float> before(c.data(), c.data() + m * t.ldc);
          if (beta == 0.0f) std::fill_n(c.data(), m * t.ldc, NAN);  // must not be read
          if (!multiply(GetParam(), t, a, b, c.data())) {
            EXPECT_EQ(std::min({m, n, k}), 1);
            continue;
          }
          double difference = 0, norm = 0;
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) {
              double sum = beta == 0.0f ? 0.0 : static_cast<double>(beta * before[static_cast<size_t>(i * t.ldc + j)]);
              for (int64_t p = 0; p < k; ++p)
                sum += 1.5 * static_cast<double>(a.data()[transpose_a ? p * t.lda + i : i * t.lda + p]) *
                       static_cast<double>(b.data()[transpose_b ? j * t.ldb + p : p * t.ldb + j]);
              difference += std::pow(static_cast<double>(c.data()[i * t.ldc + j]) - sum, 2);
              norm += sum * sum;
            }
            for (int64_t j = n; j < t.ldc && beta != 0.0f; ++j)
              EXPECT_EQ(c.data()[i * t.ldc + j], before[static_cast<size_t>(i * t.ldc + j)]) << "beside the result";
          }
          // bf16 instructions add in fp32, but round each pair of products' sum on its own.
          EXPECT_LE(std::sqrt(difference / norm), 2e-6) << m << " x " << n << " x " << k << transpose_a << transpose_b;
        }
      }
    }
  }
}

// Where a matrix lies, which products came before, and how many threads there are, changes no bit.
TEST_P(Gemm, SameBitsWhereverAMatrixLies) {
  for (const Case& t :
       {packed({70, 130, 300}), packed({70, 130, 300, true, false}), packed({70, 130, 300, false, true}),
        packed({3, 2000, 65}), packed({65, 64, 1024, true, false}, 1.0f, 0.0f, 3)}) {
    std::vector<float> first;
    for (const int64_t offset : {0, 1, 2, 4, 7, 8, 16}) {
      const Numbers a(t.a_count(), 1, offset), b(t.b_count(), 2, offset / 2);
      Numbers c(t.shape.m * t.ldc, 3, offset);
      omp_set_num_threads(offset % 2 == 0 ? 1 : 4);
      if (!multiply(GetParam(), t, a, b, c.data())) GTEST_SKIP() << "no bf16 products on this processor";
      EXPECT_EQ(omp_get_max_threads(), offset % 2 == 0 ? 1 : 4);
      std::vector<float> result;
      for (int64_t i = 0; i < t.shape.m; ++i)
        result.insert(result.end(), c.data() + i * t.ldc, c.data() + i * t.ldc + t.shape.n);
      if (first.empty()) first = result;
      EXPECT_EQ(std::memcmp(first.data(), result.data(), first.size() * sizeof(float)), 0)
          << t.shape.m << " x " << t.shape.n << " x " << t.shape.k << ", " << offset << " floats off";
    }
  }
}

TEST_P(Gemm, ManyThreadsAtOnce) {
  const Case t = packed({65, 130, 300});
  const Numbers a(t.a_count(), 1), b(t.b_count(), 2);
  Numbers alone(t.shape.m * t.ldc, 3);
  if (!multiply(GetParam(), t, a, b, alone.data())) GTEST_SKIP() << "no bf16 products on this processor";
  int wrong = 0;
#pragma omp parallel for num_threads(4) reduction(+ : wrong)
  for (int i = 0; i < 64; ++i) {
    Numbers c(t.shape.m * t.ldc, 4);
    multiply(GetParam(), t, a, b, c.data());
    wrong += std::memcmp(c.data(), alone.data(), static_cast<size_t>(t.shape.m * t.ldc) * sizeof(float)) != 0;
  }
  EXPECT_EQ(wrong, 0);
}

INSTANTIATE_TEST_SUITE_P(, Gemm, testing::Values(Which::kLibrary, Which::kOurs, Which::kBf16),
                         [](const testing::TestParamInfo<Which>& which) {
                           return std::string(which.param == Which::kLibrary ? "Library"
                                              : which.param == Which::kOurs  ? "Ours"
                                                                             : "Bf16");
                         });

// Rows and columns of the left operand that lie in any way, numbers of rows and registers that fill no tile; what is
// overwritten is not read, and nothing beside the result is written.
TEST(TileProduct, IsTheSumInFloat64) {
  for (const int64_t m : {1, 2, 3, 4, 5, 6, 13, 64}) {
    for (const int64_t n : {16, 32, 48, 64, 112}) {
      for (const int64_t k : {1, 3, 64, 300}) {
        for (const bool transposed : {false, true}) {
          for (const bool add : {false, true}) {
            const int64_t ldb = n + 3, ldc = n + 1;
            const LeftOperand left = {nullptr, transposed ? 1 : k + 2, transposed ? m + 5 : 1};
            const Numbers a(m * left.row + k * left.step, 1), b(k * ldb, 2);
            Numbers c((m + 1) * ldc, 3);
            const std::vector<float> before(c.data(), c.data() + (m + 1) * ldc);
            for (int64_t i = 0; i < m && !add; ++i) std::fill_n(c.data() + i * ldc, n, NAN);
            tile_product(m, n, k, {a.data(), left.row, left.step}, b.data(), ldb, c.data(), ldc, add);
            for (int64_t i = 0; i < m; ++i) {
              for (int64_t j = 0; j < n; ++j) {
                double sum = add ? static_cast<double>(before[static_cast<size_t>(i * ldc + j)]) : 0.0, size = 1;
                for (int64_t p = 0; p < k; ++p) {
                  const double product = static_cast<double>(a.data()[i * left.row + p * left.step]) *
                                         static_cast<double>(b.data()[p * ldb + j]);
                  sum += product;
                  size += std::abs(product);
                }
                ASSERT_NEAR(static_cast<double>(c.data()[i * ldc + j]), sum, 2e-7 * size)
                    << m << " x " << n << " x " << k << ", number " << i << ", " << j;
              }
              ASSERT_EQ(c.data()[i * ldc + n], before[static_cast<size_t>(i * ldc + n)]) << "beside the result";
            }
            ASSERT_TRUE(std::equal(before.end() - ldc, before.end(), c.data() + m * ldc)) << "after the result";
          }
        }
      }
    }
  }
}

// kGemmBuffers, which a budget sets aside, holds what is packed twice over.
TEST(LibraryProducts, PackLittleOfLargeMatrices) {
  for (const GemmShape& shape : {GemmShape{512, 12800, 768, false, true}, GemmShape{512, 3072, 768, false, false},
                                 GemmShape{12800, 768, 512, true, false}}) {
    const Case t = packed(shape);
    const Numbers a(t.a_count(), 1), b(t.b_count(), 2);
    Numbers c(t.shape.m * t.ldc, 3);
    largest_block = 0;
    multiply(Which::kLibrary, t, a, b, c.data());
    EXPECT_LE(2 * largest_block, kGemmBuffers) << shape.m << " x " << shape.n << " x " << shape.k;
    if (gemm_description().starts_with("oneDNN")) {
      EXPECT_GT(largest_block, 0u);
    }
  }
}

TEST(Bf16Products, AreRefusedWithoutRoom) {
  const Case t = packed({512, 1024, 1024, true, false});
  const Numbers a(t.a_count(), 1), b(t.b_count(), 2);
  Numbers c(t.shape.m * t.ldc, 3);
  const float before = c.data()[0];
  Numbers room(16, 4);
  const bool done = gemm_bf16(t.shape, 1.0f, narrow(a, t.a_count()).data(), t.lda, narrow(b, t.b_count()).data(), t.ldb,
                              0.0f, c.data(), t.ldc, room.data(), 64);
  EXPECT_TRUE(done || c.data()[0] == before);
}

}  // namespace
