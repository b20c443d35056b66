// classifier.cpp: softmax and cross-entropy over the vocabulary, loss and gradient.
// Memory-bound: a row of logits comes from memory once for its maximum and stays in the second-level cache for the sum
// of exponentials and the gradient, which overwrites it.
#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/operands.h"

namespace {

template <typename T>
float row_maximum(const T* logits, int64_t count) {
  Accumulators maxima;
  std::fill_n(maxima.lanes, std::size(maxima.lanes), Lanes{} + to_float(logits[0]));
  accumulate_numbers(
      maxima, count, [](Lanes& maximum, const Lanes& x) { larger(maximum, x, maximum); }, logits);
  return maxima.maximum();
}

// In pieces, so that fp32 sums of a large vocabulary stay exact enough, and that the next row comes from memory
// meanwhile.
template <typename T>
float sum_of_exponentials(const T* logits, const T* next_row, float maximum, int64_t count) {
  constexpr int64_t kPiece = 1024;
  float total = 0;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    Accumulators sums = {};
    const int64_t piece = std::min(kPiece, count - begin);
    prefetch(next_row + begin, piece);
    const auto add = [&](Lanes& sum, const Lanes& x) {
      Lanes power;
      simd_exp2(power, (x - maximum) * kLog2E);
      sum += power;
    };
    accumulate_numbers(sums, piece, add, logits + begin);
    total += sums.sum();
  }
  return total;
}

// logits = factor e^(logits - shift).
template <typename T>
void exponentiate(T* logits, int64_t count, float shift, float factor) {
  const auto scaled_power = [&](Lanes& result, const Lanes& x) {
    simd_exp2(result, (x - shift) * kLog2E);
    result *= factor;
  };
  map_numbers(count, scaled_power, logits, logits);
}

template <typename T>
float classify_row(T* logits, const T* next_row, int32_t target, int64_t vocabulary, int64_t padded, float scale,
                   bool write_gradient, float* lse) {
  if (target < 0) {
    if (write_gradient) std::fill_n(logits, padded, from_float<T>(0.0f));
    if (lse) *lse = 0.0f;
    return 0.0f;
  }
  const float maximum = row_maximum(logits, vocabulary);
  const float sum = sum_of_exponentials(logits, next_row, maximum, vocabulary);
  const float target_logit = to_float(logits[target]);
  if (write_gradient) {
    const float factor = scale / sum;
    exponentiate(logits, vocabulary, maximum, factor);
    logits[target] = from_float<T>(scale * (std::exp(target_logit - maximum) / sum - 1.0f));
    std::fill(logits + vocabulary, logits + padded, from_float<T>(0.0f));
  }
  if (lse) *lse = maximum + std::log(sum);
  return std::log(sum) - (target_logit - maximum);
}

// The row's columns first .. first + count - 1 of all, of which those below `vocabulary` count.
template <typename T>
void gradient_of_row(T* logits, int32_t target, float lse, int64_t first, int64_t count, int64_t vocabulary,
                     float scale) {
  const int64_t used = target < 0 ? 0 : std::clamp<int64_t>(vocabulary - first, 0, count), hit = target - first;
  const float target_logit = 0 <= hit && hit < used ? to_float(logits[hit]) : 0.0f;
  exponentiate(logits, used, lse, scale);
  if (0 <= hit && hit < used) logits[hit] = from_float<T>(scale * (std::exp(target_logit - lse) - 1.0f));
  std::fill(logits + used, logits + count, from_float<T>(0.0f));
}

}  // namespace

void CpuBackend::classifier(Tensor losses, Tensor logits, Tensor targets, int64_t vocabulary, float gradient_scale,
                            bool write_gradient, Tensor lse) {
  check_classifier(losses, logits, targets, vocabulary, lse);
  const int64_t rows = logits.rows(), padded = logits.cols();
  const Profiler::Scope scope(profiler, "classifier", 0,
                              static_cast<double>(logits.bytes()) * (write_gradient ? 2 : 1));
  dispatch(logits.dtype, [&]<typename T>() {
    parallel_blocks(threads_, rows, rows_per_span(padded), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        losses.as<float>()[i] = classify_row(element<T>(logits, i), element<const T>(logits, i + 1),
                                             targets.as<const int32_t>()[i], vocabulary, padded, gradient_scale,
                                             write_gradient, lse.empty() ? nullptr : lse.as<float>() + i);
      }
    });
  });
}

void CpuBackend::classifier_gradient(Tensor logits, Tensor targets, Tensor lse, int64_t first, int64_t vocabulary,
                                     float gradient_scale) {
  check_classifier_gradient(logits, targets, lse, first, vocabulary);
  const int64_t cols = logits.cols();
  const Profiler::Scope scope(profiler, "classifier_gradient", 0, 2.0 * static_cast<double>(logits.bytes()));
  dispatch(logits.dtype, [&]<typename T>() {
    parallel_blocks(threads_, logits.rows(), rows_per_span(cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        gradient_of_row(element<T>(logits, i), targets.as<const int32_t>()[i], lse.as<const float>()[i], first, cols,
                        vocabulary, gradient_scale);
      }
    });
  });
}
