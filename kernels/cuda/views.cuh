// views.cuh: rows of fp32 or bf16 numbers as the memory-bound kernels see them: read and written as floats, several
// neighbours at a time with 16-byte accesses. Eight neighbours at an aligned address are an octet: 16 bytes of bf16.
//
// What the operations of a model demand: a row begins at a multiple of 16 bytes and has whole octets, which 8, 16, 24,
// ... channels give (cuda_refuses() in backend.h tells a user of others). A contiguous tensor may also be one long row
// of any length. So there is one kernel for each operation, and none for odd addresses. Operations of optimizers on a
// matrix, whose columns may be a rank, take any length and read other rows number by number.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/dispatch.h"
#include "kernels/operands.h"
#include "kernels/tensor.h"

inline constexpr int kOctet = 8;

// kCount neighbouring numbers as they are in memory.
template <typename T, int kCount>
struct Vector {
  static constexpr int kPacks = kCount / Pack<T>::kSize;
  static_assert(kPacks * Pack<T>::kSize == kCount, "whole 16-byte packs");
  Pack<T> packs[kPacks];
};

template <int kCount, typename T>
__device__ inline Vector<T, kCount> load_vector(const T* address) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < vector.kPacks; ++i) vector.packs[i] = load128(address + i * Pack<T>::kSize);
  return vector;
}

// For data that nothing reads again soon.
template <int kCount, typename T>
__device__ inline Vector<T, kCount> load_vector_streaming(const T* address) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < vector.kPacks; ++i) vector.packs[i] = load128_streaming(address + i * Pack<T>::kSize);
  return vector;
}

template <typename T, int kCount>
__device__ inline void store_vector(T* address, const Vector<T, kCount>& vector) {
#pragma unroll
  for (int i = 0; i < vector.kPacks; ++i) store128(address + i * Pack<T>::kSize, vector.packs[i]);
}

template <int kCount>
__device__ inline void unpack(const Vector<float, kCount>& vector, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = vector.packs[i / 4].v[i % 4];
}

// Word by word: one instruction for each number.
template <int kCount>
__device__ inline void unpack(const Vector<bf16, kCount>& vector, float (&values)[kCount]) {
  uint32_t words[kCount / 2];
  memcpy(words, &vector, sizeof words);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    values[2 * i] = bits_to_float(words[i] << 16);
    values[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
  }
}

template <int kCount>
__device__ inline void pack(Vector<float, kCount>& vector, const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.packs[i / 4].v[i % 4] = values[i];
}

template <int kCount>
__device__ inline void pack(Vector<bf16, kCount>& vector, const float (&values)[kCount]) {
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) words[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
  memcpy(&vector, words, sizeof words);
}

template <typename T, int kCount>
__device__ inline void store_floats(T* address, const float (&values)[kCount]) {
  Vector<T, kCount> vector;
  pack(vector, values);
  store_vector(address, vector);
}

// Numbers per vector: 16 bytes of the narrowest of the types.
template <typename... Ts>
inline constexpr int kVectorWidth = ((sizeof(Ts) == 4) && ...) ? 4 : 8;

// ---- views

template <typename T, int kCount>
struct VectorView {
  static constexpr int kWidth = kCount;
  using Raw = Vector<T, kCount>;

  T* data;
  int64_t pitch;

  __device__ Raw load(int64_t row, int64_t column) const {
    return load_vector_streaming<kCount>(data + row * pitch + column);
  }
  // For data that is read again soon.
  __device__ Raw load_again(int64_t row, int64_t column) const {
    return load_vector<kCount>(data + row * pitch + column);
  }
  __device__ static void unpack(const Raw& raw, float (&values)[kCount]) { ::unpack(raw, values); }
  __device__ void store(int64_t row, int64_t column, const float (&values)[kCount]) const {
    store_floats(data + row * pitch + column, values);
  }
  __device__ float load_one(int64_t row, int64_t column) const { return to_float(data[row * pitch + column]); }
  __device__ void store_one(int64_t row, int64_t column, float value) const {
    data[row * pitch + column] = from_float<T>(value);
  }
};

// Numbers of a type known at run time: for what is small or in a cache, because the types of the loads keep them from
// overlapping.
struct AnyView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t pitch = 0;

  __device__ float load_one(int64_t row, int64_t column) const {
    const int64_t at = row * pitch + column;
    return dtype == DType::kBF16 ? to_float(static_cast<const bf16*>(data)[at]) : static_cast<const float*>(data)[at];
  }
  __device__ void store_one(int64_t row, int64_t column, float value) const {
    const int64_t at = row * pitch + column;
    if (dtype == DType::kBF16) {
      static_cast<bf16*>(data)[at] = from_float<bf16>(value);
    } else {
      static_cast<float*>(data)[at] = value;
    }
  }
  __device__ void load_octet(int64_t row, int64_t column, float (&values)[kOctet]) const {
    const int64_t at = row * pitch + column;
    if (dtype == DType::kBF16) {
      unpack(load_vector<kOctet>(static_cast<const bf16*>(data) + at), values);
    } else {
      unpack(load_vector<kOctet>(static_cast<const float*>(data) + at), values);
    }
  }
  // Half of an octet.
  __device__ void load_octet(int64_t row, int64_t column, float (&values)[kOctet / 2]) const {
    if (dtype == DType::kBF16) {
#pragma unroll
      for (int i = 0; i < kOctet / 2; ++i) values[i] = load_one(row, column + i);
    } else {
      unpack(load_vector<kOctet / 2>(static_cast<const float*>(data) + row * pitch + column), values);
    }
  }
  __device__ void store_octet(int64_t row, int64_t column, const float (&values)[kOctet]) const {
    const int64_t at = row * pitch + column;
    if (dtype == DType::kBF16) {
      store_floats(static_cast<bf16*>(data) + at, values);
    } else {
      store_floats(static_cast<float*>(data) + at, values);
    }
  }
};

// Stands for an operand that an operation does not have.
struct NoView {
  struct Raw {};
  __device__ Raw load(int64_t, int64_t) const { return {}; }
  template <int kCount>
  __device__ static void unpack(Raw, float (&values)[kCount]) {
    for (float& value : values) value = 0.0f;
  }
  __device__ float load_one(int64_t, int64_t) const { return 0.0f; }
};

// ---- on the host: from tensors to views

inline AnyView any_view(const Tensor& t) {
  require(is_floating(t), "fp32 or bf16");
  return {t.data, t.dtype, t.leading_dimension()};
}

template <typename T, int kCount>
VectorView<T, kCount> vector_view(const Tensor& t) {
  return {t.as<T>(), t.leading_dimension()};
}

inline bool begins_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

inline bool has_octet_rows(const Tensor& t) {
  const size_t pitch = static_cast<size_t>(t.leading_dimension()) * dtype_size(t.dtype);
  return begins_aligned(t) && (t.rows() <= 1 || pitch % 16 == 0) && t.cols() % kOctet == 0;
}

template <typename... Tensors>
void require_octet_rows(const Tensors&... tensors) {
  require((has_octet_rows(tensors) && ...),
          "on a GPU rows begin at multiples of 16 bytes and have a multiple of 8 columns");
}

// How an elementwise operation walks over its tensors: contiguous ones as one long row, strided ones row by row. Blocks
// take tiles of kTile neighbouring vectors of one row, so that only the tile's number has to be divided.
struct Extent {
  int64_t rows = 0, cols = 0;  // only a single row may have columns left over behind its vectors

  int64_t tiles(int width, int tile) const { return rows * row_tiles(width, tile); }
  HOST_DEVICE int64_t row_tiles(int width, int tile) const { return (cols / width + tile - 1) / tile; }
};

struct Tile {
  int64_t row, first;  // the first of its vectors
};

template <int kWidth, int kTile>
__device__ inline Tile tile_of(const Extent& extent, int64_t index) {
  if (extent.rows == 1) return {0, index * kTile};
  const uint64_t row_tiles = static_cast<uint64_t>(extent.row_tiles(kWidth, kTile));
  const uint64_t row = static_cast<uint64_t>(index) / row_tiles;
  return {static_cast<int64_t>(row), static_cast<int64_t>(static_cast<uint64_t>(index) - row * row_tiles) * kTile};
}

template <typename... Tensors>
Extent common_extent(const Tensor& first, const Tensors&... others) {
  require(((others.elements() == first.elements()) && ...), "elementwise: sizes differ");
  require((has_uniform_rows(first) && ... && has_uniform_rows(others)),
          "elementwise: rows of a view must have one stride");
  if (first.elements() == 0) return {};
  if ((first.contiguous() && ... && others.contiguous())) {
    require((begins_aligned(first) && ... && begins_aligned(others)),
            "on a GPU tensors begin at multiples of 16 bytes");
    return {1, first.elements()};
  }
  require(((others.cols() == first.cols()) && ...), "elementwise: rows differ in length");
  require_octet_rows(first, others...);
  return {first.rows(), first.cols()};
}
