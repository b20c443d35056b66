// parameter.h: what an optimizer or a sink knows about one trained tensor, without knowing the model it belongs to.
#pragma once

#include <cstdint>
#include <string>

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
  bool long_lived =
      false;  // its gradient is summed from pieces while others come and go (embedding, head): fp32, own buffer

  int64_t elements() const { return rows * cols; }
  int64_t padded_elements() const { return padded_rows * cols; }
  uint32_t hash() const { return hash_name(name.c_str()); }
  // A tensor of its shape without padding, [rows, cols] or [cols], in `memory`, which may have padding rows behind.
  Tensor tensor(void* memory, DType dtype, float* scales = nullptr) const {
    return matrix ? Tensor::of(memory, dtype, {rows, cols}, scales) : Tensor::of(memory, dtype, {cols}, scales);
  }
  Tensor tensor(const Tensor& memory) const { return tensor(memory.data, memory.dtype, memory.scales); }
};
