// parameter_store.h: the seam "where the weights are". The model acquires a layer before it uses it and releases it
// after; a resident store answers at once, a streaming one prefetches the next layer and writes a changed one back.
#pragma once

#include <vector>

#include "flora/parameter.h"
#include "kernels/tensor.h"

class ParameterStore {
 public:
  virtual ~ParameterStore() = default;
  virtual const std::vector<Parameter>& parameters() const = 0;

  // Layer -1 holds the embeddings, the final LayerNorm and the head. acquire() makes the layer's tensors valid until
  // release(); `changed` says that an optimizer wrote to them. Calls nest (a sink updates while the model holds the
  // layer).
  virtual void acquire(int layer) = 0;
  virtual void release(int layer, bool changed) = 0;

  // [rows, cols] of an acquired layer's parameter, without padding; padded_weight() includes the padding rows (zeros).
  virtual Tensor weight(const Parameter& parameter) = 0;
  virtual Tensor padded_weight(const Parameter& parameter) = 0;
  virtual Tensor master(const Parameter& parameter) = 0;  // fp32 copy, or an empty tensor where there is none
};
