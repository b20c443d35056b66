// tensor.h: a non-owning view of numbers in some device's memory, and the element types the project stores.
// A Tensor never allocates; the arena (memory_plan.h) owns every buffer. Views are cheap to copy and pass by value.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

enum class DType : uint8_t {
  kF32,
  kBF16,
  kI8,   // block-wise quantized: momentum (Backend::quantize) or weights (Backend::quantize_weight)
  kU8,   // block-wise quantized, unsigned code map (second moments); see Backend::quantize
  kI32,  // token ids and indices
};

// What a dtype is called and how large an element is: one row for each, in the order of the enum.
struct DTypeRow {
  size_t size;
  const char* name;
  const char* safetensors;
};
inline constexpr DTypeRow kDTypes[] = {
    {4, "fp32", "F32"}, {2, "bf16", "BF16"}, {1, "int8", "I8"}, {1, "uint8", "U8"}, {4, "int32", "I32"},
};
inline const DTypeRow& row_of(DType dtype) { return kDTypes[static_cast<size_t>(dtype)]; }
inline size_t dtype_size(DType dtype) { return row_of(dtype).size; }
inline const char* dtype_name(DType dtype) { return row_of(dtype).name; }
inline const char* safetensors_name(DType dtype) { return row_of(dtype).safetensors; }

HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Storage of a bfloat16 number. Arithmetic happens in float; conversion to bf16 rounds to nearest, ties to even.
struct bf16 {
  uint16_t bits;
};

HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

HOST_DEVICE inline float to_float(float value) { return value; }
HOST_DEVICE inline float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

template <typename T>
HOST_DEVICE inline T from_float(float value);

template <>
HOST_DEVICE inline float from_float<float>(float value) {
  return value;
}

// Round to nearest even. A NaN stays a NaN: its quiet bit is set so that truncation cannot turn it into infinity.
template <>
HOST_DEVICE inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bf16{static_cast<uint16_t>((is_nan ? (bits | 0x00400000u) : rounded) >> 16)};
}

// Number of consecutive elements that share one scale in an 8-bit block-wise quantized tensor.
inline constexpr int64_t kQuantBlock = 256;

// 8-bit weights: the largest code, and a fresh scale as a fraction of the block's largest magnitude, which leaves room
// for weights to grow before the scale has to change.
inline constexpr float kMostWeightCode = 127.0f, kFreshWeightScale = 1.125f / kMostWeightCode;

inline int64_t quant_blocks(int64_t elements) { return divide_up(elements, kQuantBlock); }

// The smallest number of rows of `cols` elements that are whole blocks.
inline int64_t quant_rows(int64_t cols) { return kQuantBlock / std::gcd(kQuantBlock, cols); }

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<int64_t, 4> shape{};
  std::array<int64_t, 4> stride{};  // in elements; the last is always 1
  float* scales = nullptr;          // kI8, kU8: one float per kQuantBlock elements of the flattened tensor

  // Contiguous, row-major.
  static Tensor of(void* data, DType dtype, std::initializer_list<int64_t> shape, float* scales = nullptr) {
    if (shape.size() < 1 || shape.size() > 4) throw std::logic_error("a tensor has 1 to 4 dimensions");
    Tensor t;
    t.data = data;
    t.dtype = dtype;
    t.rank = static_cast<int>(shape.size());
    int i = 0;
    for (int64_t extent : shape) t.shape[i++] = extent;
    int64_t step = 1;
    for (i = t.rank - 1; i >= 0; --i) {
      t.stride[i] = step;
      step *= t.shape[i];
    }
    t.scales = scales;
    return t;
  }

  bool empty() const { return data == nullptr; }
  explicit operator bool() const { return data != nullptr; }

  int64_t elements() const {
    int64_t count = rank == 0 ? 0 : 1;
    for (int i = 0; i < rank; ++i) count *= shape[i];
    return count;
  }

  // Bytes of the elements themselves, without the block scales.
  size_t bytes() const { return static_cast<size_t>(elements()) * dtype_size(dtype); }

  // A tensor seen as a matrix: the last dimension is the columns, all others together the rows.
  int64_t cols() const { return shape[rank - 1]; }
  int64_t rows() const { return cols() == 0 ? 0 : elements() / cols(); }
  int64_t leading_dimension() const { return rank >= 2 ? stride[rank - 2] : shape[0]; }

  bool contiguous() const {
    int64_t step = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != step) return false;
      step *= shape[i];
    }
    return true;
  }

  // The same elements as a contiguous tensor of another shape. Throws std::logic_error when the counts differ.
  Tensor view(std::initializer_list<int64_t> new_shape) const {
    Tensor t = of(data, dtype, new_shape, scales);
    if (!contiguous() || t.elements() != elements()) throw std::logic_error("view: the shapes do not match");
    return t;
  }

  // Rows [begin, begin + count) of the first dimension. Of a tensor with block scales they must begin where a block
  // does.
  Tensor slice(int64_t begin, int64_t count) const {
    if (begin < 0 || count < 0 || begin + count > shape[0]) throw std::logic_error("slice: out of range");
    Tensor t = *this;
    const int64_t first = begin * stride[0];
    t.data = static_cast<char*>(data) + static_cast<size_t>(first) * dtype_size(dtype);
    if (scales) {
      if (first % kQuantBlock != 0) throw std::logic_error("slice: begins inside of a block that shares a scale");
      t.scales = scales + first / kQuantBlock;
    }
    t.shape[0] = count;
    return t;
  }

  // Columns [begin, begin + count) of every row; not of a tensor with scales.
  Tensor columns(int64_t begin, int64_t count) const {
    if (scales || begin < 0 || count < 0 || begin + count > cols()) throw std::logic_error("columns: out of range");
    Tensor t = *this;
    t.data = static_cast<char*>(data) + static_cast<size_t>(begin) * dtype_size(dtype);
    t.shape[rank - 1] = count;
    return t;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The leading dimensions of a view can be counted through with one stride.
inline bool has_uniform_rows(const Tensor& t) {
  for (int i = 0; i + 2 < t.rank; ++i) {
    if (t.shape[i] != 1 && t.stride[i] != t.stride[i + 1] * t.shape[i + 1]) return false;
  }
  return true;
}

template <typename T>
T* element(const Tensor& t, int64_t row, int64_t column = 0) {
  return t.as<T>() + row * t.leading_dimension() + column;
}
