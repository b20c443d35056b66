// parameter_store.h: the seam "where the weights are". The model acquires a layer before it uses it and releases it
// after; resident layers are there at once, a streamed one is fetched ahead and written back when it has changed.
#pragma once

#include <functional>
#include <vector>

#include "flora/parameter.h"
#include "kernels/layer_stream.h"
#include "kernels/tensor.h"

class ParameterStore {
 public:
  virtual ~ParameterStore() = default;
  virtual const std::vector<Parameter>& parameters() const = 0;

  // Layer -1 holds the embeddings, the final LayerNorm and the head. acquire() makes the layer's tensors valid until
  // release(); `changed` says that an optimizer wrote to them. Calls nest (a sink updates while the model holds the
  // layer).
  virtual void acquire(int layer, Access access = Access::kRead) = 0;
  virtual void release(int layer, bool changed) = 0;

  virtual DType dtype(const Parameter& parameter) const = 0;  // of weight()

  // Of an acquired layer's parameter. weight(): its numbers to compute with, [rows, cols] without padding, valid until
  // the next weight() of a matrix (8-bit ones are decoded into a buffer that all share); padded_weight() includes the
  // padding rows (zeros), which only long-lived parameters have.
  virtual Tensor weight(const Parameter& parameter) = 0;
  virtual Tensor padded_weight(const Parameter& parameter) = 0;
  virtual Tensor stored(const Parameter& parameter) = 0;  // as it is kept: what an optimizer changes
  // Sets an acquired layer's weight: fill(rows, begin) writes rows [begin, begin + rows.rows()) as fp32 or bf16
  // numbers; it is called once with everything, or piece by piece for a weight that is stored as codes.
  virtual void assign(const Parameter& parameter, const std::function<void(Tensor rows, int64_t begin)>& fill) {
    fill(stored(parameter), 0);
  }
  virtual Tensor master(const Parameter& parameter) = 0;  // fp32 copy, or an empty tensor where there is none
};
