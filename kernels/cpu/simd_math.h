// simd_math.h: exp and the logistic function of a register, from multiplications, additions and bit operations (libm's
// take one number at a time). Fused multiply-adds where the file is compiled with -ffp-contract=fast (Makefile).
#pragma once

#include "kernels/cpu/lanes.h"

// e^x with a relative error below 2e-7; 0 below -87, infinity above 88, NaN for NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2; e^r = 1 + r + r^2 p(r), p the polynomial of degree 4 that makes the largest
// relative error smallest (3e-9; found by Remez exchange); 2^n is put together from its exponent bits.
inline void simd_exp(Lanes& out, const Lanes& x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const Lanes shifted = x * kLog2E + kRound;
  const Lanes n = shifted - kRound;
  const Lanes r = (x - n * kLn2High) - n * kLn2Low;
  Lanes p = r * 0.001381454017f + 0.008368745109f;
  p = p * r + 0.04166839078f;
  p = p * r + 0.166665204f;
  p = p * r + 0.4999999343f;
  const Lanes fraction = r * r * p + r + 1.0f;
  const Lanes power = reinterpret_cast<Lanes>((reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u);
  const Lanes bounded = x > 88.0f ? Lanes{} + __builtin_inff() : fraction * power;
  out = x < -87.0f ? Lanes{} : bounded;
}

// 1 / (1 + e^-x).
inline void simd_logistic(Lanes& out, const Lanes& x) {
  simd_exp(out, -x);
  out = 1.0f / (1.0f + out);
}
