// state_blocks.cpp: conversion of blocks between fp32 and the dtypes of weights and states. In L1, so its cost hides
// behind the memory traffic of the operations that use it, except for the 8-bit code maps (two square roots an
// element).
#include "kernels/cpu/state_blocks.h"

#include <cmath>
#include <cstring>

#include "kernels/cpu/philox_lanes.h"

namespace {

// int8: value = s * sign * (|code| / 127)^2.
void decode_int8(float* out, const int8_t* codes, float s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(codes[i]) * (1.0f / 127.0f);
    out[i] = s * (x * std::fabs(x));
  }
}

// uint8: value = s * (code / 255)^4.
void decode_uint8(float* out, const uint8_t* codes, float s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(codes[i]) * (1.0f / 255.0f);
    out[i] = s * ((x * x) * (x * x));
  }
}

float largest_magnitude(const float* in, int64_t count) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(in[i]));
  return largest;
}

// Integers up to 2^22 round to nearest even when 1.5 * 2^23 is added; this vectorises where lrintf would not.
int32_t round_to_int(float x) { return static_cast<int32_t>(float_to_bits(x + 12582912.0f) & 0x3FFFFFu); }

// |x| / s, at most 1. A division each, not a reciprocal once: 1/s overflows for a subnormal s.
float magnitude_ratio(float x, float s) { return std::min(1.0f, std::fabs(x) / s); }

void encode_int8(int8_t* codes, float* scale, const float* in, int64_t count) {
  const float s = largest_magnitude(in, count);
  *scale = s;
  if (s == 0.0f) {
    std::memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t code = round_to_int(127.0f * std::sqrt(magnitude_ratio(in[i], s)));
    codes[i] = static_cast<int8_t>(in[i] < 0.0f ? -code : code);
  }
}

void encode_uint8(uint8_t* codes, float* scale, const float* in, int64_t count) {
  const float s = largest_magnitude(in, count);
  *scale = s;
  if (s == 0.0f) {
    std::memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t code = round_to_int(255.0f * std::sqrt(std::sqrt(magnitude_ratio(in[i], s))));
    codes[i] = static_cast<uint8_t>(in[i] == 0.0f ? 0 : std::max(1, code));
  }
}

}  // namespace

const float* load_block(const Tensor& tensor, int64_t begin, int64_t count, Block& buffer) {
  switch (tensor.dtype) {
    case DType::kF32: return tensor.as<float>() + begin;
    case DType::kBF16: {
      const bf16* in = tensor.as<bf16>() + begin;
      for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(in[i]);
      break;
    }
    case DType::kI8: decode_int8(buffer, tensor.as<int8_t>() + begin, tensor.scales[begin / kQuantBlock], count); break;
    case DType::kU8:
      decode_uint8(buffer, tensor.as<uint8_t>() + begin, tensor.scales[begin / kQuantBlock], count);
      break;
    case DType::kI32: break;
  }
  return buffer;
}

void store_block(const Tensor& tensor, int64_t begin, int64_t count, const float* values) {
  switch (tensor.dtype) {
    case DType::kF32: {
      float* out = tensor.as<float>() + begin;
      if (out != values) std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
      break;
    }
    case DType::kBF16: {
      bf16* out = tensor.as<bf16>() + begin;
      for (int64_t i = 0; i < count; ++i) out[i] = from_float<bf16>(values[i]);
      break;
    }
    case DType::kI8:
      encode_int8(tensor.as<int8_t>() + begin, &tensor.scales[begin / kQuantBlock], values, count);
      break;
    case DType::kU8:
      encode_uint8(tensor.as<uint8_t>() + begin, &tensor.scales[begin / kQuantBlock], values, count);
      break;
    case DType::kI32: break;
  }
}

void store_block_stochastic(const Tensor& tensor, int64_t begin, int64_t count, const float* values,
                            const RandomKey& key, uint32_t step) {
  if (tensor.dtype != DType::kBF16) {
    store_block(tensor, begin, count, values);
    return;
  }
  // Eight elements share a Philox block; a view may start inside one, so up to kQuantBlock / 8 + 1 blocks are needed.
  constexpr int64_t kElements = 8, kWordsPerCall = 4 * kPhiloxLanes;
  constexpr int64_t kCalls = kQuantBlock / (kElements * kPhiloxLanes) + 1;
  uint32_t words[kCalls * kWordsPerCall];
  const uint64_t first = key.offset + static_cast<uint64_t>(begin);
  const int64_t skip = static_cast<int64_t>(first % kElements);
  const int64_t calls = (skip + count + kElements * kPhiloxLanes - 1) / (kElements * kPhiloxLanes);
  const uint64_t k = philox_key(key);
  for (int64_t call = 0; call < calls; ++call)
    philox_lanes(words + call * kWordsPerCall, k, key.tensor, step, first / kElements + call * kPhiloxLanes);
  uint16_t bits[2 * kCalls * kWordsPerCall];  // rounding_bits() of all elements, one after another
  std::memcpy(bits, words, static_cast<size_t>(calls * kWordsPerCall) * sizeof(uint32_t));
  bf16* out = tensor.as<bf16>() + begin;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = round_stochastic(values[i], bits[skip + i]);
}

void fill_normals(float* out, uint64_t first, int64_t count, const RandomKey& key, uint32_t step) {
  constexpr int64_t kGroup = 4 * kPhiloxLanes;
  const uint64_t k = philox_key(key);
  uint32_t words[kGroup];
  float group[kGroup];
  for (int64_t i = 0; i < count;) {
    const int64_t skip = static_cast<int64_t>((first + i) % 4);
    const int64_t used = std::min(count - i, kGroup - skip);
    philox_lanes(words, k, key.tensor, step, (first + i) / 4);
    normals_from_words(used == kGroup ? out + i : group, words);
    if (used < kGroup) std::memcpy(out + i, group + skip, static_cast<size_t>(used) * sizeof(float));
    i += used;
  }
}
