// gelu.cpp: GELU in its tanh form. One read and one write (backward: two reads, one write): memory-bound in fp32, bound
// by instructions in bf16 (docs/performance.md). 0.5 (1 + tanh u) is the logistic function of 2u, which keeps its
// relative precision where 1 + tanh u cancels.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/operands.h"

namespace {

constexpr float kTwoSqrt2OverPi = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

// s = logistic(2u), 2u = kTwoSqrt2OverPi x (1 + kCubic x^2).
inline void logistic_of_2u(Lanes& s, const Lanes& x, const Lanes& square) {
  constexpr float kLinear = -kTwoSqrt2OverPi * kLog2E;
  simd_logistic2(s, x * (square * (kLinear * kCubic) + kLinear));
}

template <typename T>
void gelu_span(T* out, const T* in, int64_t count) {
  const auto gelu = [](Lanes& result, const Lanes& x) {
    Lanes s;
    logistic_of_2u(s, x, x * x);
    result = x * s;
  };
  map_numbers(count, gelu, out, in);
}

// gelu'(x) = s + x s (1 - s) d(2u)/dx with s = logistic(2u).
template <typename T>
void gelu_gradient_span(T* d, const T* in, int64_t count) {
  const auto gradient = [](Lanes& result, const Lanes& d_out, const Lanes& x) {
    Lanes s, square = x * x;
    smaller(square, Lanes{} + 1e30f, square);  // s (1 - s) is 0 from there on
    logistic_of_2u(s, x, square);
    const Lanes slope = square * (3.0f * kTwoSqrt2OverPi * kCubic) + kTwoSqrt2OverPi;
    result = d_out * (x * s * (1.0f - s) * slope + s);
  };
  map_numbers(count, gradient, d, d, in);
}

}  // namespace

void CpuBackend::gelu_forward(Tensor out, Tensor in) {
  const Profiler::Scope scope(profiler, "gelu_forward", 0, static_cast<double>(in.bytes() + out.bytes()));
  require(out.dtype == in.dtype, "gelu_forward: one dtype");
  dispatch(out.dtype, [&]<typename T>() {
    parallel_spans(threads_, {out, in}, [&](int64_t row, int64_t column, int64_t count) {
      gelu_span(element<T>(out, row, column), element<const T>(in, row, column), count);
    });
  });
}

// Where there are enough chunks of rows for the threads, a row is summed into dbias while it is in the caches.
void CpuBackend::gelu_backward(Tensor d, Tensor dbias, Tensor in, bool accumulate) {
  check_gelu_backward(d, dbias, in);
  const Profiler::Scope scope(profiler, "gelu_backward", 0, static_cast<double>(in.bytes() + 2 * d.bytes()));
  float* const partials = shared_scratch(static_cast<size_t>(row_sum_partials(d)) * sizeof(float));
  if (row_chunks(d.rows()) >= 4 * threads_) {
    sum_rows(threads_, dbias, d, accumulate, partials, [&]<typename T>(int64_t row, T* d_row) {
      gelu_gradient_span(d_row, element<const T>(in, row), d.cols());
    });
    return;
  }
  dispatch(d.dtype, [&]<typename T>() {
    parallel_spans(threads_, {d, in}, [&](int64_t row, int64_t column, int64_t count) {
      gelu_gradient_span(element<T>(d, row, column), element<const T>(in, row, column), count);
    });
  });
  sum_rows(threads_, dbias, d, accumulate, partials, [](int64_t, auto*) {});
}
