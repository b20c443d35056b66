// optimizer_updates.cpp: operations that change weights, and the sums that precede them. Memory-bound; AdamW moves 28
// bytes an fp32 parameter in one pass.
#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/state_blocks.h"
#include "kernels/operands.h"

namespace {

// The new value of a weight: to the master copy where there is one (the weight is then its rounding), else to the
// weight itself, stochastically if it is bf16.
struct Destination {
  Tensor weight, master;
  RandomKey key;
  uint32_t step;

  const float* load(int64_t begin, int64_t count, Block& buffer) const {
    return load_block(master.empty() ? weight : master, begin, count, buffer);
  }
  void store(int64_t begin, int64_t count, const float* values) const {
    if (master.empty()) {
      store_block_stochastic(weight, begin, count, values, key, step);
      return;
    }
    store_block(master, begin, count, values);
    store_block(weight, begin, count, values);
  }
};

}  // namespace

void CpuBackend::accumulate(Tensor accumulator, Tensor in, RandomKey key, const uint32_t* counter) {
  check_state(accumulator, in);
  const Profiler::Scope scope(profiler, "accumulate", 0, static_cast<double>(in.bytes() + 2 * accumulator.bytes()));
  for_each_block(threads_, in.elements(), [&](int64_t begin, int64_t count) {
    Block in_buffer, old_buffer, sum;
    const float* added = load_block(in, begin, count, in_buffer);
    const float* old = load_block(accumulator, begin, count, old_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sum[i] = old[i] + added[i];
    store_block_stochastic(accumulator, begin, count, sum, key, *counter);
  });
}

void CpuBackend::clip_scale(StepScalars* scalars, const float* squares, float clip_norm) {
  const float norm = std::sqrt(*squares);
  scalars->gradient_scale = std::min(1.0f, clip_norm / (norm + 1e-6f));
}

void CpuBackend::apply_update(Tensor weight, Tensor master, Tensor update, const ApplyOptions& options,
                              const float* update_squares, const float* weight_squares, int64_t elements, RandomKey key,
                              const StepScalars* scalars, const MomentumAverage* average) {
  check_apply_update(weight, master, update, options, weight_squares);
  if (average) ema(*average, scalars);
  const Profiler::Scope scope(profiler, "apply_update", 0, update_bytes(weight, master, update));
  if (scalars->gate == 0) return;
  const float count_f = static_cast<float>(elements);
  float lr = scalars->lr * options.lr_scale, shrink = 1.0f;
  if (options.clip > 0) shrink = 1.0f / std::max(1.0f, std::sqrt(*update_squares / count_f) / options.clip);
  if (options.scale_parameter) lr *= std::max(options.eps2, std::sqrt(*weight_squares / count_f));
  const float decay = options.weight_decay;
  const Destination destination{weight, master, key, scalars->step};
  for_each_block(threads_, weight.elements(), [&](int64_t begin, int64_t count) {
    Block weight_buffer, update_buffer, result;
    const float* w = destination.load(begin, count, weight_buffer);
    const float* d = load_block(update, begin, count, update_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) result[i] = w[i] - lr * (decay * w[i] + shrink * d[i]);
    destination.store(begin, count, result);
  });
}

void CpuBackend::unfactored_update(std::span<const ParameterUpdate> parameters, const UnfactoredOptions& options,
                                   const StepScalars* scalars, SquaresTarget squares) {
  leave_squares(squares, parameters);
  for (const ParameterUpdate& p : parameters) {
    full_second_moment(p.grad, p.second_moment, options.eps1, scalars);
    float update_squares = 0, weight_squares = 0;
    scaled_momentum_update(p.grad, p.momentum, {}, {}, options.beta1, scalars, {&update_squares, false});
    if (options.scale_parameter) leave_squares({&weight_squares, false}, p.master.empty() ? p.weight : p.master);
    const ApplyOptions apply = {.weight_decay = p.weight_decay,
                                .lr_scale = p.lr_scale,
                                .clip = options.clip,
                                .scale_parameter = options.scale_parameter,
                                .eps2 = options.eps2};
    apply_update(p.weight, p.master, p.grad, apply, &update_squares, &weight_squares, p.grad.elements(), p.key, scalars,
                 nullptr);
  }
}

void CpuBackend::adamw_update(std::span<const ParameterUpdate> parameters, const AdamWOptions& options,
                              const StepScalars* scalars, SquaresTarget squares) {
  leave_squares(squares, parameters);
  const Profiler::Scope scope(profiler, "adamw_update", 0, update_bytes(parameters));
  if (scalars->gate == 0) return;
  for (const ParameterUpdate& p : parameters) {
    const float beta1 = p.momentum.empty() ? 0.0f : options.beta1, rest1 = 1.0f - beta1;
    const float beta2 = options.beta2, rest2 = 1.0f - beta2;
    const float correct1 = 1.0f / scalars->bias_correction1, correct2 = 1.0f / scalars->bias_correction2;
    const float lr = scalars->lr * p.lr_scale, eps = options.eps, decay = p.weight_decay;
    const Destination destination{p.weight, p.master, p.key, scalars->step};
    for_each_block(threads_, p.weight.elements(), [&](int64_t begin, int64_t count) {
      Block grad_buffer, m_buffer, v_buffer, weight_buffer, new_m, new_v, result;
      const float* g = load_block(p.grad, begin, count, grad_buffer);
      const float* old_m = p.momentum.empty() ? g : load_block(p.momentum, begin, count, m_buffer);
      const float* old_v = load_block(p.second_moment, begin, count, v_buffer);
      const float* w = destination.load(begin, count, weight_buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        new_m[i] = beta1 * old_m[i] + rest1 * g[i];
        new_v[i] = beta2 * old_v[i] + rest2 * (g[i] * g[i]);
        const float step = correct1 * new_m[i] / (std::sqrt(correct2 * new_v[i]) + eps);
        result[i] = w[i] - lr * (step + decay * w[i]);
      }
      if (!p.momentum.empty()) store_block(p.momentum, begin, count, new_m);
      store_block(p.second_moment, begin, count, new_v);
      destination.store(begin, count, result);
    });
  }
}

void CpuBackend::sgd_update(std::span<const ParameterUpdate> parameters, float beta1, const StepScalars* scalars,
                            SquaresTarget squares) {
  leave_squares(squares, parameters);
  const Profiler::Scope scope(profiler, "sgd_update", 0, update_bytes(parameters));
  if (scalars->gate == 0) return;
  for (const ParameterUpdate& p : parameters) {
    const float lr = scalars->lr * p.lr_scale, decay = p.weight_decay;
    const Destination destination{p.weight, p.master, p.key, scalars->step};
    for_each_block(threads_, p.weight.elements(), [&](int64_t begin, int64_t count) {
      Block grad_buffer, m_buffer, weight_buffer, new_m, result;
      const float* u = load_block(p.grad, begin, count, grad_buffer);
      if (!p.momentum.empty()) {
        const float* old = load_block(p.momentum, begin, count, m_buffer);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) new_m[i] = beta1 * old[i] + u[i];
        store_block(p.momentum, begin, count, new_m);
        u = new_m;
      }
      const float* w = destination.load(begin, count, weight_buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) result[i] = w[i] - lr * (decay * w[i] + u[i]);
      destination.store(begin, count, result);
    });
  }
}
