// gelu.cpp: GELU in its tanh form. One read and one write (backward: two reads, one write): memory-bound in fp32, bound
// by instructions in bf16 (docs/performance.md). 0.5 (1 + tanh u) is the logistic function of 2u, which keeps its
// relative precision where 1 + tanh u cancels.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/operands.h"

namespace {

constexpr float kTwoSqrt2OverPi = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

template <typename T>
void gelu_span(T* out, const T* in, int64_t count) {
  for_each_lanes(count, [&](int64_t i, int64_t used) {
    Lanes x, s;
    load_lanes(x, in + i, used);
    simd_logistic(s, kTwoSqrt2OverPi * (kCubic * x * x * x + x));
    store_lanes(out + i, used, x * s);
  });
}

// gelu'(x) = s + x s (1 - s) d(2u)/dx with s = logistic(2u).
template <typename T>
void gelu_gradient_span(T* d, const T* in, int64_t count) {
  for_each_lanes(count, [&](int64_t i, int64_t used) {
    Lanes x, s, d_out;
    load_lanes(x, in + i, used);
    load_lanes(d_out, d + i, used);
    const Lanes square = kCubic * x * x;
    simd_logistic(s, kTwoSqrt2OverPi * (square * x + x));
    const Lanes slope = kTwoSqrt2OverPi * (3.0f * square + 1.0f);
    store_lanes(d + i, used, d_out * (x * s * (1.0f - s) * slope + s));
  });
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

void CpuBackend::gelu_backward(Tensor d, Tensor dbias, Tensor in, bool accumulate) {
  check_gelu_backward(d, dbias, in);
  {
    const Profiler::Scope scope(profiler, "gelu_backward", 0, static_cast<double>(in.bytes() + 2 * d.bytes()));
    dispatch(d.dtype, [&]<typename T>() {
      parallel_spans(threads_, {d, in}, [&](int64_t row, int64_t column, int64_t count) {
        gelu_gradient_span(element<T>(d, row, column), element<const T>(in, row, column), count);
      });
    });
  }
  bias_backward(dbias, d, accumulate);
}
