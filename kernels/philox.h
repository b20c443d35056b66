// philox.h: counter-based random numbers (Philox4x32-10), the same bits on every device and in every order of
// evaluation. The full specification, for an independent implementation, is in docs/numerics.md; this header is its
// only C++ copy. Cost on one AVX-512 core: about 1.2 ns per normal, less for everything else.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/tensor.h"

// What a random number is for; part of the key, so that no two uses share numbers. The values are part of the format.
enum class RandomPurpose : uint32_t {
  kInit = 1,                    // initial weights
  kProjection = 2,              // Flora's momentum projection
  kAccumulationProjection = 3,  // projection of the accumulated gradient
  kWeightRounding = 4,          // stochastic rounding of weights
  kGradientRounding = 5,        // stochastic rounding of accumulated gradients
  kDataOrder = 6,               // shuffling of shards and sequences
  kSampling = 7,                // text generation
};

// 32-bit FNV-1a hash of a tensor's name.
inline uint32_t hash_name(const char* name) {
  uint32_t hash = 2166136261u;
  for (; *name; ++name) hash = (hash ^ static_cast<uint8_t>(*name)) * 16777619u;
  return hash;
}

// Names one stream of random numbers; the step (or projection index) is added where the numbers are drawn.
struct RandomKey {
  uint64_t seed = 0;  // of the run
  RandomPurpose purpose = RandomPurpose::kInit;
  uint32_t tensor = 0;  // hash_name() of the tensor
  uint64_t offset = 0;  // position of the view's first element in the whole unpadded tensor
};

// ---- the generator

HOST_DEVICE inline uint64_t splitmix64(uint64_t x) {
  uint64_t z = x + 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// The 64-bit Philox key of a stream.
HOST_DEVICE inline uint64_t philox_key(const RandomKey& key) {
  return splitmix64(key.seed + static_cast<uint64_t>(key.purpose) * 0x9E3779B97F4A7C15ull);
}

struct PhiloxWords {
  uint32_t w[4];
};

inline constexpr int kPhiloxRounds = 10;

// One round of Philox4x32 on a counter (c0, c1, c2, c3) with key (k0, k1).
HOST_DEVICE inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
  const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

// Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
HOST_DEVICE inline PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                          uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return PhiloxWords{{c0, c1, c2, c3}};
}

// Block `block` of the stream (key, step): four words.
HOST_DEVICE inline PhiloxWords philox_block(const RandomKey& key, uint32_t step, uint64_t block) {
  const uint64_t k = philox_key(key);
  return philox4x32(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), key.tensor, step,
                    static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32));
}

// ---- from words to numbers

// [0, 1), 24 bits.
HOST_DEVICE inline float uniform_from_word(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// sin(2 pi t) and cos(2 pi t) for t in [-1/8, 1/8], a fraction of a turn; minimax polynomials.
HOST_DEVICE inline void sin_cos_of_turn(float t, float& sine, float& cosine) {
  const float z = t * t;
  float s = 41.47294998168945f;  // sin(2 pi t) / t
  s = fmaf(s, z, -76.69786834716797f);
  s = fmaf(s, z, 81.6052017211914f);
  s = fmaf(s, z, -41.34170150756836f);
  s = fmaf(s, z, 6.2831854820251465f);
  sine = s * t;
  float c = 59.202796936035156f;
  c = fmaf(c, z, -85.44229888916016f);
  c = fmaf(c, z, 64.9393081665039f);
  c = fmaf(c, z, -19.739208221435547f);
  cosine = fmaf(c, z, 1.0f);
}

// Two independent N(0, 1) by Box-Muller (see docs/numerics.md): u = ((wa >> 8) + 1) 2^-24, radius = sqrt(-2 ln u),
// angle = 2 pi (wb >> 8) 2^-24; first = radius cos(angle), second = radius sin(angle). Relative error below 1e-6; the
// same bits everywhere, because nothing but +, *, fma and integer operations is used and contraction is off.
HOST_DEVICE inline void normal_pair(uint32_t wa, uint32_t wb, float& first, float& second) {
  // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); ln(1 + f) = f - f^2/2 + f^3 p(f), p minimax of degree 7.
  const float u = static_cast<float>(static_cast<int32_t>((wa >> 8) + 1u)) * 0x1p-24f;
  const uint32_t u_bits = float_to_bits(u);
  const int32_t e = static_cast<int32_t>(u_bits - 0x3F3504F3u) >> 23;
  const float f = bits_to_float(u_bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float p = -0.07634492963552475f;
  p = fmaf(p, f, 0.12761574983596802f);
  p = fmaf(p, f, -0.13160182535648346f);
  p = fmaf(p, f, 0.14201758801937103f);
  p = fmaf(p, f, -0.16623356938362122f);
  p = fmaf(p, f, 0.20001226663589478f);
  p = fmaf(p, f, -0.2500081956386566f);
  p = fmaf(p, f, 0.3333333134651184f);
  const float f2 = f * f;
  const float ln_mantissa = fmaf(f2 * f, p, fmaf(f2, -0.5f, f));
  const float x = fmaf(static_cast<float>(e), -1.3862943611198906f, -2.0f * ln_mantissa);  // -2 ln u, 0 at u = 1

  // y = 1/sqrt(x) by Newton from a bit-level guess (finite at x = 0), then radius = sqrt(x) with one correction.
  float y = bits_to_float(0x5F3759DFu - (float_to_bits(x) >> 1));
  y = y * fmaf(-0.5f * x * y, y, 1.5f);
  y = y * fmaf(-0.5f * x * y, y, 1.5f);
  y = y * fmaf(-0.5f * x * y, y, 1.5f);
  const float root = x * y;
  const float radius = fmaf(0.5f * y, fmaf(-root, root, x), root);

  // The angle is a 24-bit fraction of a turn: the nearest quarter turn q, and the rest t in [-1/8, 1/8] exactly.
  const int32_t turn = static_cast<int32_t>(wb >> 8);
  const int32_t q = (turn + (1 << 21)) >> 22;
  const float t = static_cast<float>(turn - q * (1 << 22)) * 0x1p-24f;
  float s, c;
  sin_cos_of_turn(t, s, c);

  // Rotate by q quarter turns: odd q swaps; cos is negative for q = 1, 2, sin for q = 2, 3.
  const uint32_t swap = 0u - (static_cast<uint32_t>(q) & 1u);
  const uint32_t s_bits = float_to_bits(s), c_bits = float_to_bits(c);
  const uint32_t cos_sign = (static_cast<uint32_t>(q + 1) & 2u) << 30;
  const uint32_t sin_sign = (static_cast<uint32_t>(q) & 2u) << 30;
  first = radius * bits_to_float(((c_bits & ~swap) | (s_bits & swap)) ^ cos_sign);
  second = radius * bits_to_float(((s_bits & ~swap) | (c_bits & swap)) ^ sin_sign);
}

// float to bf16 with probability proportional to the distance: z is uniform in [0, 65535]. Infinities and NaN are
// converted as usual.
HOST_DEVICE inline bf16 round_stochastic(float value, uint32_t z) {
  const uint32_t bits = float_to_bits(value);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return finite ? bf16{static_cast<uint16_t>((bits + z) >> 16)} : from_float<bf16>(value);
}

// The 16 bits that round element i of a tensor, from block i / 8 of its stream.
HOST_DEVICE inline uint32_t rounding_bits(const PhiloxWords& words, uint64_t i) {
  return (words.w[(i % 8) / 2] >> (16 * (i % 2))) & 0xFFFFu;
}
