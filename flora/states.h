// states.h: the memory that an optimizer works on: its states, and weights that are stored as 8-bit codes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flora/parameter.h"
#include "kernels/backend.h"
#include "kernels/layer_stream.h"
#include "kernels/memory_plan.h"

// Phases in which parameters are updated, so in which scratch of an update is alive. Never while the head runs: the
// gate has to see the loss first.
inline constexpr uint32_t kUpdatePhases = kPhaseBackward | kPhaseUpdate;

// A state as a checkpoint stores it, in its own dtype (int8 and uint8 with scales).
struct StateTensor {
  std::string name;  // "<parameter>.<what>", e.g. "h.0.mlp.c_fc.weight.momentum"
  int layer = -1;    // of the parameter
  Tensor tensor;     // dtype and shape; the memory is get()'s
};

// Elements and, of an 8-bit state, scales become 0.
void zero_state(Backend& backend, const Tensor& state);

// All states of an optimizer: on the device, or those of the blocks streamed from host memory or from ranks, a few
// layers at a time, while the backward pass goes down the layers.
class StateStore {
 public:
  // `place`: of the states of the blocks.
  StateStore(const std::vector<Parameter>& parameters, const LayerPlace& place, Backend& backend);
  ~StateStore();  // the memory may be gone, so nothing is written back

  // One more state, with dtype and shape of a tensor without memory. Returns its number.
  int add(const Parameter& parameter, const char* what, const Tensor& shape);

  void declare(MemoryPlan& plan);
  void zero();  // all states, as they start

  // Makes the states of a layer valid for get(), until another layer is held; in parts only the last one asked for.
  // Layer -1 and states that are not streamed are always valid.
  void hold(int layer, Access access);

  Tensor get(int number) const;  // an empty tensor for -1

  // Of a state that ranks keep: this rank's elements, [count], in place, and that they were written to. Layers that are
  // held are given back.
  Tensor part(int number);
  void part_changed(int number);

  const std::vector<StateTensor>& list() const { return states_; }

 private:
  bool streamed(const StateTensor& state) const {
    return stream_ && state.layer >= 0 && (state.tensor.rank > 1 || !place_.peers);
  }

  // In the stream: a layer of the model and a number within it. In parts every state is a layer of its own, because
  // nobody needs more than one of them whole at a time.
  struct Where {
    int layer = -1, number = -1;
  };

  LayerPlace place_;
  Backend& backend_;
  std::vector<StateTensor> states_;
  std::vector<Where> where_;  // by number
  int spread_ = 0;            // states that are layers of their own
  Access access_ = Access::kRead;
  std::unique_ptr<LayerStream> stream_;
  std::unique_ptr<HeldLayer<LayerStream>> held_;
};

// Rows [begin, begin + count) of a matrix, or everything.
struct RowRange {
  int64_t begin = 0, count = -1;
  Tensor of(const Tensor& t) const { return count < 0 || t.empty() ? t : t.slice(begin, count); }
};

// Updates a weight that may be stored as 8-bit codes. Codes are decoded to fp32 piece by piece, updated, and encoded
// again with stochastic rounding, so that no fp32 copy of a whole matrix exists. Costs two more passes over the weight;
// the pieces stay in the cache of a large GPU.
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
