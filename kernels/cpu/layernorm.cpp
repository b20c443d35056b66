// layernorm.cpp: LayerNorm over the channels of each token, forward and backward.
// Memory-bound. A row (a few KiB) stays in the first-level cache between the statistics and the output, so each element
// comes from memory once and goes there once. Backward: dweight and dbias are sums over all rows, one partial per chunk
// of rows.
#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/parallel.h"
#include "kernels/operands.h"

namespace {

constexpr float kEpsilon = 1e-5f;

struct Statistics {
  float mean, rstd;
};

template <typename In>
Statistics row_statistics(const In* in, int64_t channels) {
  Accumulators sums = {}, squares = {};
  accumulate_numbers(
      sums, channels, [](Lanes& sum, const Lanes& x) { sum += x; }, in);
  const float mean = sums.sum() / static_cast<float>(channels);
  const auto add_square = [&](Lanes& sum, const Lanes& x) { sum += (x - mean) * (x - mean); };
  accumulate_numbers(squares, channels, add_square, in);
  return {mean, 1.0f / std::sqrt(squares.sum() / static_cast<float>(channels) + kEpsilon)};
}

template <typename T, typename Weight>
void normalize_row(T* out, const T* in, Statistics s, const Weight* weight, const Weight* bias, int64_t channels) {
  const auto normalize = [&](Lanes& result, const Lanes& x, const Lanes& w, const Lanes& b) {
    result = (x - s.mean) * s.rstd * w + b;
  };
  map_numbers(channels, normalize, out, in, weight, bias);
}

struct Forward {
  Tensor out, mean, rstd, in, weight, bias;
};

// before_row(row) runs just before the row is read.
template <typename F>
void layernorm_rows(int threads, const Forward& f, F&& before_row) {
  const int64_t channels = f.in.cols();
  dispatch(f.in.dtype, f.weight.dtype, [&]<typename T, typename Weight>() {
    parallel_blocks(threads, f.in.rows(), rows_per_span(channels), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        before_row(row);
        const T* in = element<const T>(f.in, row);
        const Statistics s = row_statistics(in, channels);
        f.mean.as<float>()[row] = s.mean;
        f.rstd.as<float>()[row] = s.rstd;
        normalize_row(element<T>(f.out, row), in, s, f.weight.as<const Weight>(), f.bias.as<const Weight>(), channels);
      }
    });
  });
}

// One row of the backward pass, with n = (in - mean) rstd and g = dout weight:
// din += rstd (g - mean(g) - n mean(g n)), dweight += dout n, dbias += dout.
template <typename T>
void backward_row(T* din, float* dweight, float* dbias, const T* dout, const T* in, Statistics s, const float* weight,
                  int64_t channels) {
  float sum = 0, sum_normalized = 0;
#pragma omp simd reduction(+ : sum, sum_normalized)
  for (int64_t j = 0; j < channels; ++j) {
    const float g = to_float(dout[j]) * weight[j];
    sum += g;
    sum_normalized += g * ((to_float(in[j]) - s.mean) * s.rstd);
  }
  const float mean_g = sum / static_cast<float>(channels);
  const float mean_gn = sum_normalized / static_cast<float>(channels);
#pragma omp simd
  for (int64_t j = 0; j < channels; ++j) {
    const float d = to_float(dout[j]);
    const float n = (to_float(in[j]) - s.mean) * s.rstd;
    dweight[j] += d * n;
    dbias[j] += d;
    din[j] = from_float<T>(to_float(din[j]) + s.rstd * ((d * weight[j] - mean_g) - n * mean_gn));
  }
}

}  // namespace

void CpuBackend::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor in, Tensor weight, Tensor bias) {
  check_layernorm_forward(out, mean, rstd, in, weight, bias);
  const Profiler::Scope scope(profiler, "layernorm_forward", 0, static_cast<double>(in.bytes() + out.bytes()));
  layernorm_rows(threads_, {out, mean, rstd, in, weight, bias}, [](int64_t) {});
}

void CpuBackend::residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                            Tensor weight, Tensor bias) {
  check_layernorm_forward(out, mean, rstd, residual, weight, bias);
  check_layernorm_summands(residual, a, b);
  const Profiler::Scope scope(profiler, "residual_layernorm_forward", 0,
                              static_cast<double>(a.bytes() + b.bytes() + residual.bytes() + out.bytes()));
  layernorm_rows(threads_, {out, mean, rstd, residual, weight, bias},
                 [&](int64_t row) { add_row(residual, a, b, row, 0, residual.cols()); });
}

void CpuBackend::layernorm_backward(Tensor din, Tensor dweight, Tensor dbias, bool accumulate_parameters, Tensor dout,
                                    Tensor in, Tensor mean, Tensor rstd, Tensor weight) {
  check_layernorm_backward(din, dweight, dbias, dout, in, mean, rstd, weight);
  const Profiler::Scope scope(profiler, "layernorm_backward", 0,
                              static_cast<double>(2 * din.bytes() + dout.bytes() + in.bytes()));
  const int64_t rows = in.rows(), channels = in.cols();
  const int64_t chunk = row_chunk(rows), chunks = (rows + chunk - 1) / chunk;
  float* const weight_fp32 = shared_scratch(static_cast<size_t>((1 + 2 * chunks) * channels) * sizeof(float));
  float* const partials = weight_fp32 + channels;  // [chunks, 2, C]: dweight, dbias
  dispatch(weight.dtype, [&]<typename Weight>() {
    for (int64_t j = 0; j < channels; ++j) weight_fp32[j] = to_float(weight.as<const Weight>()[j]);
  });
  dispatch(in.dtype, [&]<typename T>() {
    parallel_blocks(threads_, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        float* const sums = partials + part * 2 * channels;
        std::fill_n(sums, 2 * channels, 0.0f);
        for (int64_t row = part * chunk; row < std::min(rows, (part + 1) * chunk); ++row) {
          const Statistics s = {mean.as<float>()[row], rstd.as<float>()[row]};
          backward_row(element<T>(din, row), sums, sums + channels, element<const T>(dout, row),
                       element<const T>(in, row), s, weight_fp32, channels);
        }
      }
    });
  });
  dispatch(dweight.dtype, [&]<typename T>() {
    add_partials(threads_, dweight.as<T>(), partials, chunks, 2 * channels, channels, accumulate_parameters);
    add_partials(threads_, dbias.as<T>(), partials + channels, chunks, 2 * channels, channels, accumulate_parameters);
  });
}
