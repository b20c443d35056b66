// state_blocks.cuh: elementwise work on weights, gradients and optimizer states of any dtype. A warp owns a block of
// kQuantBlock elements, the unit that shares a scale in 8-bit tensors, and a lane eight consecutive ones: 16 bytes of
// bf16, and as many roundings as one Philox block gives. The largest magnitude of a block is five shuffles, so an
// operation reads and writes each tensor once whatever its dtype. Dtypes are switched at run time, the same way in
// all lanes of a warp: a template for each combination would be hundreds of kernels.
//
// Reading has two steps, so that the loads of all tensors are under way before the first one is waited for: fetch()
// brings the bytes, decode() makes numbers of them.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/views.cuh"
#include "kernels/philox.h"

static_assert(kOctet * kWarp == kQuantBlock);

// ---- which elements

inline constexpr int kStateThreads = 256;
inline constexpr int kStateWarps = kStateThreads / kWarp;

// Thread blocks for `elements`, when every warp takes `blocks_per_warp` blocks; at least one, as a launch needs.
inline dim3 state_grid(int64_t elements, int blocks_per_warp = 1) {
  const int64_t per_thread_block = kQuantBlock * kStateWarps * blocks_per_warp;
  return dim3(static_cast<unsigned>(elements > 0 ? (elements + per_thread_block - 1) / per_thread_block : 1));
}

// The block of this warp, or the k-th of `blocks_per_warp`; it may lie past the end of the tensor.
__device__ inline int64_t block_of_warp(int blocks_per_warp = 1, int k = 0) {
  return (static_cast<int64_t>(blockIdx.x) * kStateWarps + threadIdx.x / kWarp) * blocks_per_warp + k;
}

// The eight elements of a lane.
struct Octet {
  int64_t block = 0;  // of the tensor
  int64_t first = 0;  // element of the tensor
  int count = 0;      // how many exist, 0 to 8: fewer at the end of the tensor
  bool full = false;  // all 256 elements of the block exist
};

__device__ inline Octet octet_of_lane(int64_t block, int64_t elements) {
  Octet octet;
  octet.block = block;
  octet.first = block * kQuantBlock + (threadIdx.x % kWarp) * kOctet;
  const int64_t left = elements - octet.first;
  octet.count = left >= kOctet ? kOctet : left > 0 ? static_cast<int>(left) : 0;
  octet.full = (block + 1) * kQuantBlock <= elements;
  return octet;
}

// ---- tensors

// What a kernel needs to know about a contiguous tensor.
struct BlockTensor {
  void* data = nullptr;  // null: there is no such tensor
  float* scales = nullptr;
  DType dtype = DType::kF32;
};

inline BlockTensor block_tensor(const Tensor& t) {
  require(begins_aligned(t), "on a GPU tensors begin at multiples of 16 bytes");
  return {t.data, t.scales, t.dtype};
}

// The bytes of an octet as they are in memory, zeros in place of elements that do not exist, and the block's scale.
struct RawOctet {
  uint32_t words[kOctet];
  float scale;
};

__device__ inline RawOctet fetch(const BlockTensor& t, const Octet& octet) {
  RawOctet raw;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) raw.words[i] = 0;
  const bool is_8bit = t.dtype == DType::kI8 || t.dtype == DType::kU8;
  raw.scale = is_8bit ? t.scales[octet.block] : 0.0f;
  if (octet.full) {
    const char* const bytes = static_cast<const char*>(t.data);
    if (t.dtype == DType::kF32) {
      const uint32_t* const in = static_cast<const uint32_t*>(t.data) + octet.first;
      const Pack<uint32_t> low = load128(in), high = load128(in + 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.words[i] = low.v[i], raw.words[i + 4] = high.v[i];
    } else if (t.dtype == DType::kBF16) {
      const Pack<uint32_t> pack = load128(static_cast<const uint32_t*>(t.data) + octet.first / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.words[i] = pack.v[i];
    } else {
      memcpy(raw.words, __builtin_assume_aligned(bytes + octet.first, 8), 8);
    }
    return raw;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i >= octet.count) continue;
    if (t.dtype == DType::kF32) {
      raw.words[i] = float_to_bits(static_cast<const float*>(t.data)[octet.first + i]);
    } else if (t.dtype == DType::kBF16) {
      raw.words[i / 2] |= static_cast<uint32_t>(static_cast<const bf16*>(t.data)[octet.first + i].bits) << (i % 2 * 16);
    } else {
      raw.words[i / 4] |= static_cast<uint32_t>(static_cast<const uint8_t*>(t.data)[octet.first + i]) << (i % 4 * 8);
    }
  }
  return raw;
}

__device__ inline void decode(float (&x)[kOctet], const RawOctet& raw, DType dtype) {
  if (dtype == DType::kF32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = bits_to_float(raw.words[i]);
  } else if (dtype == DType::kBF16) {
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      x[i] = bits_to_float(raw.words[i / 2] << 16);
      x[i + 1] = bits_to_float(raw.words[i / 2] & 0xffff0000u);
    }
  } else if (dtype == DType::kI8) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const int code = static_cast<int8_t>((raw.words[i / 4] >> (i % 4 * 8)) & 0xffu);
      const float root = static_cast<float>(code) * (1.0f / 127.0f);
      x[i] = raw.scale * (root * fabsf(root));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const int code = static_cast<int>((raw.words[i / 4] >> (i % 4 * 8)) & 0xffu);
      const float root = static_cast<float>(code) * (1.0f / 255.0f);
      x[i] = raw.scale * ((root * root) * (root * root));
    }
  }
}

// ---- writing

// Two packs of a lane lie 32 bytes from its neighbour's, so that either store alone would fill every second half of a
// 32-byte sector. Neighbours exchange halves: each store then fills whole sectors.
__device__ inline void store_fp32_octet(float* out, const float (&x)[kOctet]) {
  const bool odd = threadIdx.x % 2 != 0;
  Pack<float> first, second;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float received = __shfl_xor_sync(kAllLanes, odd ? x[i] : x[i + 4], 1);
    first.v[i] = odd ? received : x[i];
    second.v[i] = odd ? x[i + 4] : received;
  }
  float* const pair = out - (odd ? kOctet : 0);  // of the even lane
  store128(pair + (odd ? 4 : 0), first);
  store128(pair + kOctet + (odd ? 4 : 0), second);
}

// Integers up to 2^22 round to nearest even when 1.5 * 2^23 is added.
__device__ inline int round_to_int(float x) { return static_cast<int>(float_to_bits(x + 12582912.0f) & 0x3FFFFFu); }

// The code of x in a block whose largest magnitude is s > 0. A division each, not a reciprocal once: 1/s overflows for
// a subnormal s.
__device__ inline uint32_t encode(float x, float s, DType dtype) {
  const float ratio = fminf(1.0f, fabsf(x) / s);
  if (dtype == DType::kI8) {
    const int code = round_to_int(127.0f * sqrtf(ratio));
    return static_cast<uint32_t>(x < 0.0f ? -code : code) & 0xffu;
  }
  const int code = round_to_int(255.0f * sqrtf(sqrtf(ratio)));
  return x == 0.0f ? 0u : static_cast<uint32_t>(code > 1 ? code : 1);
}

// The codes of an octet, four to a word.
__device__ inline void store_codes(const BlockTensor& t, const Octet& octet, const uint32_t (&words)[2]) {
  uint8_t* const out = static_cast<uint8_t*>(t.data) + octet.first;
  if (octet.full) {
    memcpy(__builtin_assume_aligned(out, 8), words, 8);
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    if (i < octet.count) out[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
}

__device__ inline void store_quantized(const BlockTensor& t, const Octet& octet, const float (&x)[kOctet]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) largest = fmaxf(largest, i < octet.count ? fabsf(x[i]) : 0.0f);
  largest = warp_max(largest);
  __syncwarp();  // every lane has read the old scale
  if (threadIdx.x % kWarp == 0) t.scales[octet.block] = largest;
  uint32_t words[2] = {0, 0};
  if (largest > 0.0f) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) words[i / 4] |= encode(x[i], largest, t.dtype) << (i % 4 * 8);
  }
  store_codes(t, octet, words);
}

// Writes bf16 numbers, two to a word.
__device__ inline void store_bf16_words(const BlockTensor& t, const Octet& octet, const Pack<uint32_t>& pack) {
  if (octet.full) {
    store128(static_cast<uint32_t*>(t.data) + octet.first / 2, pack);
    return;
  }
  bf16* const out = static_cast<bf16*>(t.data) + octet.first;
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    if (i < octet.count) out[i].bits = static_cast<uint16_t>(pack.v[i / 2] >> (i % 2 * 16));
}

// Rounds to nearest, or quantizes with a new scale. All lanes of a warp call this together.
__device__ inline void store(const BlockTensor& t, const Octet& octet, const float (&x)[kOctet]) {
  if (t.dtype == DType::kF32) {
    float* const out = static_cast<float*>(t.data) + octet.first;
    if (octet.full) {
      store_fp32_octet(out, x);
      return;
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < octet.count) out[i] = x[i];
  } else if (t.dtype == DType::kBF16) {
    Pack<uint32_t> pack;
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) pack.v[i / 2] = pack_bf16(x[i], x[i + 1]);
    store_bf16_words(t, octet, pack);
  } else {
    store_quantized(t, octet, x);
  }
}

// ---- random numbers

// A RandomKey whose Philox key has been worked out on the host.
struct RandomStream {
  uint64_t key = 0;
  uint64_t offset = 0;
  uint32_t tensor = 0;
};

inline RandomStream random_stream(const RandomKey& key) { return {philox_key(key), key.offset, key.tensor}; }

__device__ inline PhiloxWords random_block(const RandomStream& stream, uint32_t step, uint64_t block) {
  return philox4x32(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream.tensor, step,
                    static_cast<uint32_t>(stream.key), static_cast<uint32_t>(stream.key >> 32));
}

// The 16-bit numbers that round elements first .. first + 7 of the stream, two to a word. A tensor that starts inside a
// Philox block needs two blocks an octet and a shift; indices stay known to the compiler, so that nothing spills.
__device__ inline void rounding_words(uint32_t (&words)[4], const RandomStream& stream, uint32_t step, uint64_t first) {
  const PhiloxWords own = random_block(stream, step, first / 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = own.w[i];
  const uint32_t skip = static_cast<uint32_t>(first % 8);
  if (skip == 0) return;
  const PhiloxWords next = random_block(stream, step, first / 8 + 1);
  uint32_t all[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) all[i] = own.w[i], all[i + 4] = next.w[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) all[i] = skip & 4 ? all[i + 2] : all[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) all[i] = skip & 2 ? all[i + 1] : all[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = skip & 1 ? (all[i] >> 16) | (all[i + 1] << 16) : all[i];
}

// bf16 tensors are rounded stochastically with the numbers of (stream, step), others as in store().
__device__ inline void store_stochastic(const BlockTensor& t, const Octet& octet, const float (&x)[kOctet],
                                        const RandomStream& stream, uint32_t step) {
  if (t.dtype != DType::kBF16) {
    store(t, octet, x);
    return;
  }
  uint32_t random[4];
  rounding_words(random, stream, step, stream.offset + static_cast<uint64_t>(octet.first));
  float zero = 0.0f;  // NaN as soon as one x is not finite
#pragma unroll
  for (int i = 0; i < kOctet; ++i) zero = fmaf(x[i], 0.0f, zero);
  Pack<uint32_t> pack;
  if (zero == 0.0f) {
    // round_stochastic() of finite numbers, two at a time.
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      const uint32_t low = float_to_bits(x[i]) + (random[i / 2] & 0xffffu);
      const uint32_t high = float_to_bits(x[i + 1]) + (random[i / 2] >> 16);
      pack.v[i / 2] = (low >> 16) | (high & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      const uint32_t low = round_stochastic(x[i], random[i / 2] & 0xffffu).bits;
      const uint32_t high = round_stochastic(x[i + 1], random[i / 2] >> 16).bits;
      pack.v[i / 2] = low | (high << 16);
    }
  }
  store_bf16_words(t, octet, pack);
}
