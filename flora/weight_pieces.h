// weight_pieces.h: updating a weight that may be stored as 8-bit codes. Codes are decoded to fp32 piece by piece,
// updated, and encoded again with stochastic rounding, so that no fp32 copy of a whole matrix exists. Costs two more
// passes over the weight; the pieces stay in the cache of a large GPU.
#pragma once

#include <algorithm>

#include "flora/optimizer_state.h"
#include "flora/parameter.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"

// Rows [begin, begin + count) of a matrix, or everything.
struct RowRange {
  int64_t begin = 0, count = -1;
  Tensor of(const Tensor& t) const { return count < 0 || t.empty() ? t : t.slice(begin, count); }
};

class WeightPieces {
 public:
  // elements: of a piece, about.
  WeightPieces(int64_t elements, Backend& backend) : elements_(elements), backend_(backend) {}

  void reserve(const Parameter& parameter) {
    if (parameter.quantized) piece_.reserve(std::min(parameter.rows, piece_rows(parameter)) * parameter.cols);
  }
  void declare(MemoryPlan& plan) { piece_.declare(plan); }

  // update(weight, master, rows, key) for all of `weight` and `master`, or for piece after piece in fp32; `rows` says
  // which of their rows these are. key.offset counts from the first element of `weight`'s parameter.
  template <typename Update>
  void update(const Parameter& parameter, const Tensor& weight, const Tensor& master, RandomKey key,
              const StepScalars* scalars, Update&& update) {
    if (weight.dtype != DType::kI8) {
      update(weight, master, RowRange{}, key);
      return;
    }
    const uint64_t offset = key.offset;
    each(parameter, weight, [&](const Tensor& codes, const Tensor& numbers, const RowRange& rows) {
      key.offset = offset + static_cast<uint64_t>(rows.begin * parameter.cols);
      update(numbers, Tensor{}, rows, key);
      backend_.quantize_weight(codes, numbers, key, scalars);
    });
  }

  // out[0] = sum of the squares of all weights.
  void sum_squares(const Parameter& parameter, Tensor out, const Tensor& weight) {
    if (weight.dtype != DType::kI8) {
      backend_.sum_squares(out, weight, false);
      return;
    }
    each(parameter, weight, [&](const Tensor&, const Tensor& numbers, const RowRange& rows) {
      backend_.sum_squares(out, numbers, rows.begin > 0);
    });
  }

 private:
  // A piece begins where a block of codes does.
  int64_t piece_rows(const Parameter& parameter) const {
    const int64_t step = quant_rows(parameter.cols);
    return std::max<int64_t>(elements_ / (parameter.cols * step), 1) * step;
  }

  template <typename F>
  void each(const Parameter& parameter, const Tensor& weight, F&& f) {
    const int64_t step = piece_rows(parameter), rows = weight.rows();
    for (int64_t begin = 0; begin < rows; begin += step) {
      const RowRange range{begin, std::min(step, rows - begin)};
      const Tensor codes = range.of(weight), numbers = piece_.tensor({range.count, parameter.cols});
      backend_.dequantize_weight(numbers, codes);
      f(codes, numbers, range);
    }
  }

  int64_t elements_;
  Backend& backend_;
  Scratch piece_{"update.weight_piece", DType::kF32, kUpdatePhases};
};
