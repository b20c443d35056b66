// optimizer_moments.cpp: first and second moments of gradients. Memory-bound: every operation reads each tensor once
// and writes what it changes once.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/state_blocks.h"
#include "kernels/operands.h"

namespace {

// Adds the squares of four rows: sums[i] = sum_j rows[i][j]^2, columns[j] += rows[0][j]^2 + ... + rows[3][j]^2.
template <typename T>
void add_squares_of_four_rows(float* sums, float* columns, const T* in, int64_t stride, int64_t cols) {
  const T *r0 = in, *r1 = in + stride, *r2 = in + 2 * stride, *r3 = in + 3 * stride;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t j = 0; j < cols; ++j) {
    const float x0 = to_float(r0[j]), x1 = to_float(r1[j]), x2 = to_float(r2[j]), x3 = to_float(r3[j]);
    const float q0 = x0 * x0, q1 = x1 * x1, q2 = x2 * x2, q3 = x3 * x3;
    s0 += q0;
    s1 += q1;
    s2 += q2;
    s3 += q3;
    columns[j] += (q0 + q1) + (q2 + q3);
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

template <typename T>
void add_squares_of_row(float* sum, float* columns, const T* in, int64_t cols) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t j = 0; j < cols; ++j) {
    const float x = to_float(in[j]);
    s += x * x;
    columns[j] += x * x;
  }
  *sum = s;
}

// M <- beta M + (1 - beta) in, for one block in fp32.
void average(float* out, const float* m, const float* in, int64_t count, float beta) {
  const float one_minus_beta = 1.0f - beta;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = beta * m[i] + one_minus_beta * in[i];
}

// state <- beta2 state + (1-beta2) mean, for the means of the rows and of the columns, whose places the scales take.
void average_and_scale(const Tensor& row_state, const Tensor& col_state, const Tensor& row_means,
                       const Tensor& col_means, float beta2) {
  const int64_t rows = row_means.elements(), cols = col_means.elements();
  const float one_minus_beta2 = 1.0f - beta2;
  float *row = row_state.as<float>(), *col = col_state.as<float>();
  float *row_factor = row_means.as<float>(), *col_factor = col_means.as<float>();
  double row_total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    row[i] = beta2 * row[i] + one_minus_beta2 * row_factor[i];
    row_total += row[i];
  }
  const float row_mean = static_cast<float>(row_total / static_cast<double>(rows));
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) row_factor[i] = 1.0f / std::sqrt(row[i] / row_mean);
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    col[j] = beta2 * col[j] + one_minus_beta2 * col_factor[j];
    col_factor[j] = 1.0f / std::sqrt(col[j]);
  }
}

}  // namespace

// Row sums of squares, and column sums as one partial per chunk of rows that are then added in order.
void CpuBackend::add_squares(const Tensor& row_sums, const Tensor& col_sums, const Tensor& grad, bool accumulate) {
  const int64_t rows = grad.rows(), cols = grad.cols();
  const int64_t chunk_rows = row_chunk(rows), chunks = (rows + chunk_rows - 1) / chunk_rows;
  float* const partials = shared_scratch(static_cast<size_t>(chunks * cols) * sizeof(float));
  float* const sums = row_sums.as<float>();
  dispatch(grad.dtype, [&]<typename T>() {
    parallel_blocks(threads_, rows, chunk_rows, [&](int64_t begin, int64_t end) {
      float* const columns = partials + begin / chunk_rows * cols;
      std::fill(columns, columns + cols, 0.0f);
      int64_t row = begin;
      for (; row + 4 <= end; row += 4)
        add_squares_of_four_rows(sums + row, columns, element<T>(grad, row), grad.leading_dimension(), cols);
      for (; row < end; ++row) add_squares_of_row(sums + row, columns, element<T>(grad, row), cols);
    });
  });
  add_partials(threads_, col_sums.as<float>(), partials, chunks, cols, cols, accumulate);
}

void CpuBackend::factored_second_moment(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                                        Tensor grad, float eps1, const StepScalars* scalars, SquaresTarget squares,
                                        const ScaledProjection* projection) {
  check_factored_second_moment(row_state, col_state, row_scale, col_scale, grad);
  if (projection) check_scaled_projection(*projection, grad);
  const int64_t rows = grad.rows(), cols = grad.cols();
  const Profiler::Scope scope(profiler, "factored_second_moment", 4.0 * rows * cols, static_cast<double>(grad.bytes()));
  if (scalars->gate == 0 && !squares.out) return;
  add_squares(row_scale, col_scale, grad, false);
  float *row = row_scale.as<float>(), *col = col_scale.as<float>();
  if (squares.out)
    *squares.out =
        static_cast<float>(std::accumulate(row, row + rows, squares.accumulate ? double{*squares.out} : 0.0));
  if (scalars->gate == 0) return;
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) row[i] = row[i] / static_cast<float>(cols) + eps1;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) col[j] = col[j] / static_cast<float>(rows) + eps1;
  average_and_scale(row_state, col_state, row_scale, col_scale, scalars->beta2);
  if (!projection) return;
  generate_projection(projection->plain, projection->kind, projection->key, projection->index);
  scale_rows_cols({projection->scaled, projection->plain, {}, projection->of_rows ? row_scale : col_scale}, nullptr);
}

// *target.out (+)= the squares of x.
void CpuBackend::leave_squares(SquaresTarget target, const Tensor& x) {
  if (target.out) sum_squares(Tensor::of(target.out, DType::kF32, {1}), {&x, 1}, target.accumulate);
}

void CpuBackend::leave_squares(SquaresTarget target, std::span<const ParameterUpdate> parameters) {
  for (const ParameterUpdate& p : parameters) {
    check_parameter(p);
    leave_squares(target, p.grad);
    target.accumulate = true;
  }
}

void CpuBackend::factored_squares(Tensor row_squares, Tensor col_squares, Tensor grad, float eps1, bool accumulate) {
  check_factored_squares(row_squares, col_squares, grad);
  const int64_t rows = grad.rows(), cols = grad.cols();
  const Profiler::Scope scope(profiler, "factored_squares", 4.0 * rows * cols, static_cast<double>(grad.bytes()));
  add_squares(row_squares, col_squares, grad, accumulate);
  float *row = row_squares.as<float>(), *col = col_squares.as<float>();
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) row[i] = row[i] / static_cast<float>(cols) + eps1;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) col[j] += static_cast<float>(rows) * eps1;
}

void CpuBackend::factored_scales(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                                 const StepScalars* scalars) {
  check_factored_scales(row_state, col_state, row_scale, col_scale);
  const Profiler::Scope scope(profiler, "factored_scales", 0,
                              4.0 * static_cast<double>(row_scale.bytes() + col_scale.bytes()));
  if (scalars->gate == 0) return;
  float* const col = col_scale.as<float>();
#pragma omp simd
  for (int64_t j = 0; j < col_scale.elements(); ++j) col[j] /= static_cast<float>(row_scale.elements());
  average_and_scale(row_state, col_state, row_scale, col_scale, scalars->beta2);
}

void CpuBackend::full_second_moment(Tensor grad, Tensor second_moment, float eps1, const StepScalars* scalars) {
  check_state(second_moment, grad);
  const Profiler::Scope scope(profiler, "full_second_moment", 0,
                              static_cast<double>(2 * grad.bytes() + 2 * second_moment.bytes()));
  if (scalars->gate == 0) return;
  const float beta2 = scalars->beta2, one_minus_beta2 = 1.0f - beta2;
  for_each_block(threads_, grad.elements(), [&](int64_t begin, int64_t count) {
    Block grad_buffer, moment_buffer, v, u;
    const float* g = load_block(grad, begin, count, grad_buffer);
    const float* old = load_block(second_moment, begin, count, moment_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      v[i] = beta2 * old[i] + one_minus_beta2 * (g[i] * g[i] + eps1);
      u[i] = g[i] / std::sqrt(v[i]);
    }
    store_block(second_moment, begin, count, v);
    store_block(grad, begin, count, u);
  });
}

void CpuBackend::scale_rows_cols(const ScaledSum& sum, const ScaledSum* beside) {
  check_scaled_sum(sum);
  const Tensor &out = sum.out, &in = sum.in, &row_scale = sum.row_scale, &col_scale = sum.col_scale, &added = sum.added;
  const float factor = sum.factor;
  const int64_t rows = in.rows(), cols = in.cols();
  const Profiler::Scope scope(profiler, "scale_rows_cols", 0, static_cast<double>(in.bytes() + out.bytes()));
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    parallel_blocks(threads_, rows, rows_per_span(cols), [&](int64_t begin, int64_t end) {
      const float* columns = col_scale.as<float>();
      for (int64_t i = begin; i < end; ++i) {
        const float row_factor = row_scale.empty() ? factor : factor * row_scale.as<float>()[i];
        const In* from = element<In>(in, i);
        Out* to = element<Out>(out, i);
        const auto scale_row = [&](auto&& added_at) {
          if (columns) {
#pragma omp simd
            for (int64_t j = 0; j < cols; ++j)
              to[j] = from_float<Out>(added_at(j, to_float(from[j]) * (row_factor * columns[j])));
          } else {
#pragma omp simd
            for (int64_t j = 0; j < cols; ++j) to[j] = from_float<Out>(added_at(j, to_float(from[j]) * row_factor));
          }
        };
        if (added.empty()) {
          scale_row([](int64_t, float x) { return x; });
        } else {
          dispatch(added.dtype, [&]<typename Added>() {
            const Added* const more = element<const Added>(added, i);
            scale_row([&](int64_t j, float x) { return x + to_float(more[j]); });
          });
        }
      }
    });
  });
  if (beside) scale_rows_cols(*beside, nullptr);
}

void CpuBackend::momentum_update(Tensor update, Tensor momentum, float beta1, const StepScalars* scalars) {
  check_state(momentum, update);
  const Profiler::Scope scope(profiler, "momentum_update", 0,
                              static_cast<double>(2 * update.bytes() + 2 * momentum.bytes()));
  if (scalars->gate == 0) return;
  for_each_block(threads_, update.elements(), [&](int64_t begin, int64_t count) {
    Block update_buffer, momentum_buffer, m;
    const float* u = load_block(update, begin, count, update_buffer);
    average(m, load_block(momentum, begin, count, momentum_buffer), u, count, beta1);
    store_block(momentum, begin, count, m);
    store_block(update, begin, count, m);
  });
}

void CpuBackend::scaled_momentum_update(Tensor update, Tensor momentum, Tensor row_scale, Tensor col_scale, float beta1,
                                        const StepScalars* scalars, SquaresTarget squares) {
  if (!row_scale.empty() || !col_scale.empty()) scale_rows_cols({update, update, row_scale, col_scale}, nullptr);
  if (!momentum.empty()) momentum_update(update, momentum, beta1, scalars);
  leave_squares(squares, update);
}

void CpuBackend::ema(const MomentumAverage& a, const StepScalars* scalars) {
  check_average(a);
  const Profiler::Scope scope(profiler, "ema", 0, static_cast<double>(a.in.bytes() + 2 * a.momentum.bytes()));
  if (scalars->gate == 0) return;
  const int64_t cols = a.in.cols();
  const float *rows = a.row_scale.as<float>(), *columns = a.col_scale.as<float>();
  for_each_block(threads_, a.in.elements(), [&](int64_t begin, int64_t count) {
    Block in_buffer, momentum_buffer, scaled, m;
    const float* added = load_block(a.in, begin, count, in_buffer);
    if (rows || columns) {
      for (int64_t i = 0; i < count;) {  // a row, or what of it is in this block
        const int64_t row = (begin + i) / cols, first = begin + i - row * cols, end = std::min(count, i + cols - first);
        const float row_factor = rows ? rows[row] : 1.0f;
#pragma omp simd
        for (int64_t k = i; k < end; ++k)
          scaled[k] = added[k] * (columns ? row_factor * columns[first + k - i] : row_factor);
        i = end;
      }
      added = scaled;
    }
    average(m, load_block(a.momentum, begin, count, momentum_buffer), added, count, a.beta1);
    store_block(a.momentum, begin, count, m);
  });
}
