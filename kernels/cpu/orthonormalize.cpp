// orthonormalize.cpp: makes the rows of a projection orthonormal, P <- L^-1 P with P P^T = L L^T. Compute-bound:
// r^2 d operations for the lower half of the Gram matrix, r^3 / 3 for the factor, r^2 d for the triangular solve.
//
// A Gaussian P has a well-conditioned Gram matrix unless r comes close to d: at r = 0.8 d its condition number is about
// 300 and fp32 is enough. Above that everything happens in fp64.
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/dispatch.h"
#include "kernels/operands.h"

namespace {

constexpr int64_t kFactorBlock = 64;  // rows that the plain Cholesky handles at a time
constexpr int64_t kPanel = 8;         // columns of P solved at a time in fp64

// gram[i, k] = sum_j p[i, j] p[k, j] in fp64, for k <= i.
template <typename T>
void gram_matrix(int threads, double* gram, const T* p, int64_t r, int64_t d) {
  parallel_blocks(threads, r, 1, [&](int64_t i, int64_t) {
    for (int64_t k = 0; k <= i; ++k) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < d; ++j)
        sum += static_cast<double>(to_float(p[i * d + j])) * static_cast<double>(to_float(p[k * d + j]));
      gram[i * r + k] = sum;
    }
  });
}

// Lower triangle of p p^T in fp32, block row by block row, so that the number of threads does not matter.
void gram_matrix_fp32(int threads, float* gram, const float* p, int64_t r, int64_t d) {
  parallel_blocks(threads, r, kFactorBlock, [&](int64_t begin, int64_t end) {
    gemm({.m = end - begin, .n = end, .k = d, .transpose_b = true}, 1.0f, p + begin * d, d, p, d, 0.0f,
         gram + begin * r, r);
  });
}

// Cholesky factor of the leading n x n block of a, in place in the lower triangle. False for a pivot that is not above
// `smallest`.
bool factor_block(double* a, int64_t stride, int64_t n, double smallest) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k <= i; ++k) {
      double sum = a[i * stride + k];
      for (int64_t j = 0; j < k; ++j) sum -= a[i * stride + j] * a[k * stride + j];
      if (k < i) {
        a[i * stride + k] = sum / a[k * stride + k];
      } else {
        if (!(sum > smallest)) return false;
        a[i * stride + i] = std::sqrt(sum);
      }
    }
  }
  return true;
}

// The same for an r x r matrix, block column by block column: factor the diagonal block, solve the rows below it,
// subtract their product from what remains.
// A pivot below `precision` times the first one is rounding noise: the rows depend on each other.
bool cholesky(double* a, int64_t r, double precision) {
  const int stride = static_cast<int>(r);
  const double smallest = precision * a[0];
  for (int64_t k = 0; k < r; k += kFactorBlock) {
    const int64_t n = std::min(kFactorBlock, r - k), below = r - k - n;
    double* diagonal = a + k * r + k;
    if (!factor_block(diagonal, r, n, smallest)) return false;
    if (below == 0) break;
    double* under = diagonal + n * r;
    cblas_dtrsm(CblasRowMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, static_cast<int>(below),
                static_cast<int>(n), 1.0, diagonal, stride, under, stride);
    cblas_dsyrk(CblasRowMajor, CblasLower, CblasNoTrans, static_cast<int>(below), static_cast<int>(n), -1.0, under,
                stride, 1.0, under + n, stride);
  }
  return true;
}

// p[:, begin:end) <- L^-1 p[:, begin:end) with L in fp64. panel: r * kPanel doubles.
template <typename T>
void solve_panel(T* p, const double* factor, int64_t r, int64_t d, int64_t begin, int64_t end, double* panel) {
  const int64_t width = end - begin;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < width; ++j) panel[i * kPanel + j] = to_float(p[i * d + begin + j]);
  cblas_dtrsm(CblasRowMajor, CblasLeft, CblasLower, CblasNoTrans, CblasNonUnit, static_cast<int>(r),
              static_cast<int>(width), 1.0, factor, static_cast<int>(r), panel, kPanel);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < width; ++j) p[i * d + begin + j] = from_float<T>(static_cast<float>(panel[i * kPanel + j]));
}

// `count` numbers at the start of `memory` from fp32 to fp64 and back. Number i of the wide form lies on numbers 2i and
// 2i + 1 of the narrow one, so widening goes from the end. memcpy, because the same bytes change their type.
void widen_in_place(void* memory, int64_t count) {
  char* const bytes = static_cast<char*>(memory);
  for (int64_t i = count - 1; i >= 0; --i) {
    float narrow;
    std::memcpy(&narrow, bytes + i * sizeof(float), sizeof(float));
    const double wide = narrow;
    std::memcpy(bytes + i * sizeof(double), &wide, sizeof(double));
  }
}

void narrow_in_place(void* memory, int64_t count) {
  char* const bytes = static_cast<char*>(memory);
  for (int64_t i = 0; i < count; ++i) {
    double wide;
    std::memcpy(&wide, bytes + i * sizeof(double), sizeof(double));
    const float narrow = static_cast<float>(wide);
    std::memcpy(bytes + i * sizeof(float), &narrow, sizeof(float));
  }
}

}  // namespace

void CpuBackend::orthonormalize_rows(Tensor p, void* scratch, StepScalars* scalars) {
  check_orthonormalize_rows(p);
  const int64_t r = p.rows(), d = p.cols();
  const bool fp64 = r * 10 > d * 8;
  if (!fp64 && p.dtype != DType::kF32) matmul(Tensor::of(scratch, DType::kF32, {r, r}), p, p, {.transpose_b = true});
  const Profiler::Scope scope(profiler, "orthonormalize_rows", 2.0 * r * r * d + 1.0 * r * r * r / 3,
                              2.0 * static_cast<double>(p.bytes()));
  double* const factor = static_cast<double*>(scratch);
  if (fp64) {
    dispatch(p.dtype, [&]<typename T>() { gram_matrix(threads_, factor, p.as<T>(), r, d); });
  } else {
    if (p.dtype == DType::kF32) gram_matrix_fp32(threads_, static_cast<float*>(scratch), p.as<float>(), r, d);
    widen_in_place(scratch, r * r);
  }
  if (!cholesky(factor, r, fp64 ? 1e-13 : 1e-6)) {
    scalars->gate = 0;
    return;
  }
  if (p.dtype == DType::kF32 && !fp64) {
    narrow_in_place(scratch, r * r);
    const float* const narrow = static_cast<const float*>(scratch);
    float* const values = p.as<float>();
    parallel_blocks(threads_, d, 64, [&](int64_t begin, int64_t end) {
      cblas_strsm(CblasRowMajor, CblasLeft, CblasLower, CblasNoTrans, CblasNonUnit, static_cast<int>(r),
                  static_cast<int>(end - begin), 1.0f, narrow, static_cast<int>(r), values + begin,
                  static_cast<int>(d));
    });
    return;
  }
  const size_t panel_bytes = static_cast<size_t>(r * kPanel) * sizeof(double);
  thread_scratch(panel_bytes);  // an error must not be thrown inside the parallel loop
  dispatch(p.dtype, [&]<typename T>() {
    parallel_blocks(threads_, d, kPanel, [&](int64_t begin, int64_t end) {
      solve_panel(p.as<T>(), factor, r, d, begin, end, reinterpret_cast<double*>(thread_scratch(panel_bytes)));
    });
  });
}
