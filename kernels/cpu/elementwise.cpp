// elementwise.cpp: additions, conversions, scalings and sums. Memory-bound: each element is read once and written once.
// Sums are made of chunks whose size depends on the number of elements alone, added in order in double precision.
#include <array>
#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/operands.h"

namespace {

// Elements that are added in fp32, in 32 sums or more, before they join a double: so few that their sum keeps 2e-6.
constexpr int64_t kSumSpan = 2048;

template <typename Out, typename In>
void convert_span(Out* out, const In* in, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<Out>(to_float(in[i]));
}

template <typename T>
void add_span(T* out, const T* a, const T* b, int64_t count) {
  map_numbers(
      count, [](Lanes& sum, const Lanes& x, const Lanes& y) { sum = x + y; }, out, a, b);
}

template <typename T>
void scale_span(T* x, float factor, int64_t count) {
  map_numbers(
      count, [&](Lanes& scaled, const Lanes& number) { scaled = number * factor; }, x, x);
}

template <bool kSquare, typename T>
double sum_span(const T* x, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kSumSpan) {
    Accumulators sums = {};
    const auto add = [](Lanes& sum, const Lanes& value) { sum += kSquare ? value * value : value; };
    accumulate_numbers(sums, std::min(kSumSpan, count - begin), add, x + begin);
    total += sums.sum();
  }
  return total;
}

template <bool kSquare>
double sum_elements(int threads, const Tensor& x) {
  require(has_uniform_rows(x), "sum: rows of a view must have one stride");
  const bool flat = x.contiguous();
  const int64_t count = flat ? x.elements() : x.rows();
  const int64_t smallest = flat ? kSpan : rows_per_span(x.cols());
  const int64_t chunk = std::max(smallest, (count + kMaxSumChunks - 1) / kMaxSumChunks);
  std::array<double, kMaxSumChunks> partials{};
  dispatch(x.dtype, [&]<typename T>() {
    parallel_blocks(threads, (count + chunk - 1) / chunk, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = part * chunk, end = std::min(count, begin + chunk);
        if (flat) {
          partials[part] = sum_span<kSquare>(x.as<const T>() + begin, end - begin);
        } else {
          for (int64_t row = begin; row < end; ++row) {
            partials[part] += sum_span<kSquare>(element<const T>(x, row), x.cols());
          }
        }
      }
    });
  });
  double total = 0;
  for (double partial : partials) total += partial;
  return total;
}

void store_sum(Tensor out, double value, bool accumulate) {
  require(out.dtype == DType::kF32, "sum: the result is fp32");
  float* target = out.as<float>();
  *target = static_cast<float>(value + (accumulate ? *target : 0.0f));
}

void scale_by(int threads, const Tensor& x, float factor) {
  if (factor == 1.0f) return;
  dispatch(x.dtype, [&]<typename T>() {
    parallel_spans(threads, {x}, [&](int64_t row, int64_t column, int64_t count) {
      scale_span(element<T>(x, row, column), factor, count);
    });
  });
}

}  // namespace

void add_row(const Tensor& out, const Tensor& a, const Tensor& b, int64_t row, int64_t column, int64_t count) {
  dispatch(out.dtype, [&]<typename T>() {
    add_span(element<T>(out, row, column), element<const T>(a, row, column), element<const T>(b, row, column), count);
  });
}

void CpuBackend::convert(Tensor out, Tensor in) {
  const Profiler::Scope scope(profiler, "convert", 0, static_cast<double>(out.bytes() + in.bytes()));
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    parallel_spans(threads_, {out, in}, [&](int64_t row, int64_t column, int64_t count) {
      convert_span(element<Out>(out, row, column), element<const In>(in, row, column), count);
    });
  });
}

void CpuBackend::scale(std::span<const Tensor> tensors, const float* factor) {
  const Profiler::Scope scope(profiler, "scale", 0, *factor == 1.0f ? 0.0 : 2.0 * total_bytes(tensors));
  for (const Tensor& x : tensors) scale_by(threads_, x, *factor);
}

void CpuBackend::sum_squares(Tensor out, std::span<const Tensor> tensors, bool accumulate) {
  const Profiler::Scope scope(profiler, "sum_squares", 0, total_bytes(tensors));
  for (const Tensor& x : tensors) {
    store_sum(out, sum_elements<true>(threads_, x), accumulate);
    accumulate = true;
  }
}

void CpuBackend::sum(Tensor out, Tensor x, float factor, bool accumulate) {
  const Profiler::Scope scope(profiler, "sum", 0, static_cast<double>(x.bytes()));
  store_sum(out, factor * sum_elements<false>(threads_, x), accumulate);
}

void CpuBackend::restore_norm(Tensor x, const float* target_squares, const float* current_squares) {
  const Profiler::Scope scope(profiler, "restore_norm", 0, 2.0 * static_cast<double>(x.bytes()));
  scale_by(threads_, x, *current_squares == 0.0f ? 1.0f : std::sqrt(*target_squares / *current_squares));
}

void CpuBackend::gate_on_finite(StepScalars* scalars, Tensor value) {
  require(value.dtype == DType::kF32, "gate_on_finite: fp32");
  if (!std::isfinite(*value.as<float>())) scalars->gate = 0;
}

void CpuBackend::increment(uint32_t* counter) { ++*counter; }

void CpuBackend::fill_constant(Tensor x, float value) {
  const Profiler::Scope scope(profiler, "fill_constant", 0, static_cast<double>(x.bytes()));
  dispatch(x.dtype, [&]<typename T>() {
    parallel_spans(threads_, {x}, [&](int64_t row, int64_t column, int64_t count) {
      std::fill_n(element<T>(x, row, column), count, from_float<T>(value));
    });
  });
}

void CpuBackend::bias_backward(Tensor dbias, Tensor dout, bool accumulate) {
  check_bias_backward(dbias, dout);
  const Profiler::Scope scope(profiler, "bias_backward", 0, static_cast<double>(dout.bytes()));
  float* const partials = shared_scratch(static_cast<size_t>(row_sum_partials(dout)) * sizeof(float));
  sum_rows(threads_, dbias, dout, accumulate, partials, [](int64_t, auto*) {});
}
