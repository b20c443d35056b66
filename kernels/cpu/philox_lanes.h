// philox_lanes.h: Philox blocks (kernels/philox.h) many at a time, in vector registers.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "kernels/philox.h"

inline constexpr int kPhiloxLanes = 16;

// Eight 32-bit numbers, each in the low half of 64 bits, so that a product of two has room (compilers split the vector
// where the machine's are shorter).
typedef uint64_t PhiloxLanes __attribute__((vector_size(64)));

// x becomes the product of its low halves with b. Compilers do not see that the high ones are ignored and multiply 64
// by 64 bits, which takes several times as long. (By reference: how such vectors are returned depends on the machine.)
inline void multiply_low(PhiloxLanes& x, uint32_t b) {
#if defined(__AVX512F__)
  // (GCC 12 warns of its own header's unmasked one.)
  x = reinterpret_cast<PhiloxLanes>(_mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(x), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  __m256i halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (__m256i& half : halves) half = _mm256_mul_epu32(half, _mm256_set1_epi64x(b));
  std::memcpy(&x, halves, sizeof x);
#else
  x = (x & 0xFFFFFFFFu) * b;
#endif
}

// Blocks first_block .. first_block + 7, as philox4x32() makes them: words[4 b + w] is word w of the b-th.
inline void eight_philox_blocks(uint32_t* words, uint64_t k, uint32_t tensor, uint32_t step, uint64_t first_block) {
  const PhiloxLanes block = PhiloxLanes{0, 1, 2, 3, 4, 5, 6, 7} + first_block;
  PhiloxLanes c0 = block, c1 = block >> 32, c2 = PhiloxLanes{} + tensor, c3 = PhiloxLanes{} + step;
  uint32_t k0 = static_cast<uint32_t>(k), k1 = static_cast<uint32_t>(k >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {  // only the low halves count; they are cleaned at the end
    PhiloxLanes p0 = c0, p1 = c2;
    multiply_low(p0, 0xD2511F53u);
    multiply_low(p1, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const PhiloxLanes first = (c0 & kLow) | (c1 << 32), second = (c2 & kLow) | (c3 << 32);
  for (int lane = 0; lane < 8; ++lane) {  // little-endian: words 0 and 1 of a block, then 2 and 3
    const uint64_t pair[2] = {first[lane], second[lane]};
    std::memcpy(words + 4 * lane, pair, sizeof pair);
  }
}

// Blocks first_block .. first_block + 15 of the stream (k, tensor, step): words[4 b + w] is word w of the b-th.
inline void philox_lanes(uint32_t* words, uint64_t k, uint32_t tensor, uint32_t step, uint64_t first_block) {
  eight_philox_blocks(words, k, tensor, step, first_block);
  eight_philox_blocks(words + 32, k, tensor, step, first_block + 8);
}

// The 64 normals of 16 blocks: out[64] from words[64].
inline void normals_from_words(float* out, const uint32_t* words) {
#pragma omp simd
  for (int pair = 0; pair < 2 * kPhiloxLanes; ++pair)
    normal_pair(words[2 * pair], words[2 * pair + 1], out[2 * pair], out[2 * pair + 1]);
}
