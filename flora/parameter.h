// parameter.h: what is known of one trained tensor without knowing the model it belongs to, and the seam "where the
// weights are".
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/layer_stream.h"
#include "kernels/philox.h"
#include "kernels/tensor.h"

struct Parameter {
  int index = 0;     // position in the model's list
  std::string name;  // Hugging Face's name, e.g. "h.0.attn.c_attn.weight"
  int layer = -1;    // transformer block, or -1: embeddings, final LayerNorm, head
  int64_t rows = 1;  // 1-D parameters have one row
  int64_t cols = 0;
  int64_t padded_rows = 1;  // rows in memory; statistics, random indices and files see `rows`
  bool matrix = false;      // 2-D
  bool decay = false;       // weight decay applies
  bool embedding = false;   // a table indexed by ids (token or position embedding)
  bool quantized = false;   // stored as 8-bit codes
  // Its gradient is summed from pieces while others come and go (embedding, head): fp32, a buffer of its own.
  bool long_lived = false;

  int64_t elements() const { return rows * cols; }
  int64_t padded_elements() const { return padded_rows * cols; }
  uint32_t hash() const { return hash_name(name.c_str()); }
  // A tensor of its shape without padding, [rows, cols] or [cols], in `memory`, which may have padding rows behind.
  Tensor tensor(void* memory, DType dtype, float* scales = nullptr) const {
    return matrix ? Tensor::of(memory, dtype, {rows, cols}, scales) : Tensor::of(memory, dtype, {cols}, scales);
  }
  Tensor tensor(const Tensor& memory) const { return tensor(memory.data, memory.dtype, memory.scales); }
  // Such a tensor of a matrix with the padding rows behind it.
  Tensor padded(Tensor t) const {
    t.shape[0] = padded_rows;
    return t;
  }
};

// Throws std::logic_error unless every parameter stands at its own index.
inline void require_indexed(const std::vector<Parameter>& parameters) {
  for (size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].index != static_cast<int>(i))
      throw std::logic_error("parameter " + parameters[i].name + " does not stand at its index");
}

// Where the weights are. The model acquires a layer before it uses it and releases it after; resident layers are there
// at once, a streamed one is fetched ahead and written back when it has changed. Ranks that keep the weights together
// acquire and release the same layers in the same order.
class ParameterStore {
 public:
  virtual ~ParameterStore() = default;
  virtual const std::vector<Parameter>& parameters() const = 0;

  // Layer -1 holds the embeddings, the final LayerNorm and the head. acquire() makes the layer's tensors valid until
  // release(); `changed` says that an optimizer wrote to them. Calls nest (a weight is updated while the model
  // holds its layer).
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

  // Whether each rank keeps a part of this parameter only; part(): its elements [begin, begin + weight.elements()) of
  // it, in place, where the rank may change them without the others; no acquire() is needed, and part_changed() ends
  // it.
  struct Kept {
    Tensor weight, master = {};  // [count], maybe none
    int64_t begin = 0;
  };
  virtual bool spread(const Parameter&) const { return false; }
  virtual Kept part(const Parameter& parameter) { return {stored(parameter), master(parameter), 0}; }
  virtual void part_changed(const Parameter&) {}
};
