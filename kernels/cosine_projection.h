// cosine_projection.h: --projection cosine: r rows, chosen at random without replacement, of the d x d matrix of the
// discrete cosine transform (DCT-II), with a random sign for each column. Its rows are orthonormal for every d, nothing
// is factored and nothing is kept:
//
//   P[k, j] = sign_j a cos(2 pi f (2 j + 1) / (4 d)),   a = sqrt(2/d), for f = 0 sqrt(1/d),   f = frequency of row k
//
// Signs and frequencies come from the random stream of the projection; the bits are the same on every device, because
// angles are reduced in integers and cosines are philox.h's polynomial.
#pragma once

#include <cstdint>

#include "kernels/philox.h"

// What all rows share, made on the host.
struct CosineBasis {
  uint32_t dimension = 0;     // d, below 2^29
  uint32_t half_bits = 0;     // of the permutation: 4^half_bits >= d
  float turns_per_angle = 0;  // 1 / (4 d)
  float amplitude = 0, first_amplitude = 0;
};

inline CosineBasis cosine_basis(int64_t dimension) {
  CosineBasis basis;
  basis.dimension = static_cast<uint32_t>(dimension);
  while ((int64_t{1} << (2 * basis.half_bits)) < dimension) ++basis.half_bits;
  const double d = static_cast<double>(dimension);
  basis.turns_per_angle = static_cast<float>(1 / (4 * d));
  basis.amplitude = static_cast<float>(std::sqrt(2 / d));
  basis.first_amplitude = static_cast<float>(std::sqrt(1 / d));
  return basis;
}

// The block of the projection's stream that the permutation is made from; signs use those from 0 on.
inline constexpr uint64_t kPermutationBlock = ~uint64_t{0};

// The frequency of row k: number k of a random permutation of 0 .. d-1. Four Feistel rounds on 2 half_bits bits,
// repeated until the number is below d (four times as many numbers at most).
HOST_DEVICE inline uint32_t cosine_frequency(const CosineBasis& basis, const PhiloxWords& keys, uint32_t k) {
  const uint32_t mask = (1u << basis.half_bits) - 1;
  do {
    uint32_t left = k >> basis.half_bits, right = k & mask;
    for (int round = 0; round < 4; ++round) {
      uint32_t x = right + keys.w[round];  // mixed as MurmurHash3 finishes
      x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
      x = (x ^ (x >> 13)) * 0xC2B2AE35u;
      x ^= x >> 16;
      const uint32_t next = left ^ (x & mask);
      left = right;
      right = next;
    }
    k = left << basis.half_bits | right;
  } while (k >= basis.dimension);
  return k;
}

// The angle f (2 j + 1) modulo 4 d of column j, in units of 1 / (4 d) of a turn; and that of the column after it.
HOST_DEVICE inline uint32_t cosine_angle(const CosineBasis& basis, uint32_t frequency, uint32_t column) {
  return static_cast<uint32_t>(static_cast<uint64_t>(frequency) * (2 * column + 1) % (4 * basis.dimension));
}
HOST_DEVICE inline uint32_t cosine_next(const CosineBasis& basis, uint32_t frequency, uint32_t angle) {
  angle += 2 * frequency;
  return angle >= 4 * basis.dimension ? angle - 4 * basis.dimension : angle;
}

HOST_DEVICE inline float cosine_amplitude(const CosineBasis& basis, uint32_t frequency) {
  return frequency == 0 ? basis.first_amplitude : basis.amplitude;
}

// cos(2 pi angle / (4 d)) for an angle below 4 d.
HOST_DEVICE inline float cosine_of(const CosineBasis& basis, uint32_t angle) {
  // The nearest quarter turn q, 0 to 4, and what remains in [-d/2, d/2].
  const uint32_t d = basis.dimension, twice = 2 * angle;
  const uint32_t q = static_cast<uint32_t>(twice >= d) + static_cast<uint32_t>(twice >= 3 * d) +
                     static_cast<uint32_t>(twice >= 5 * d) + static_cast<uint32_t>(twice >= 7 * d);
  const float rest = static_cast<float>(static_cast<int32_t>(angle) - static_cast<int32_t>(q * d));
  float sine, cosine;
  sin_cos_of_turn(rest * basis.turns_per_angle, sine, cosine);
  const uint32_t swap = 0u - (q & 1u), negative = ((q + 1) & 2u) << 30;
  return bits_to_float(((float_to_bits(cosine) & ~swap) | (float_to_bits(sine) & swap)) ^ negative);
}
