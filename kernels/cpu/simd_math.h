// simd_math.h: exp and the logistic function from multiplications, additions and bit operations, so that the compiler
// turns a loop over them into vector code (libm's are calls). About 12 instructions for 8 or 16 numbers at once.
#pragma once

#include "kernels/cpu/lanes.h"
#include "kernels/tensor.h"

namespace exp_constants {
inline constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
inline constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
inline constexpr float kP0 = 0.4999999343f, kP1 = 0.166665204f, kP2 = 0.04166839078f, kP3 = 0.008368745109f;
inline constexpr float kP4 = 0.001381454017f;
}  // namespace exp_constants

// e^x with a relative error below 2e-7; 0 below -87, infinity above 88, NaN for NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2; e^r = 1 + r + r^2 p(r), p the polynomial of degree 4 that makes the largest
// relative error smallest (3e-9; found by Remez exchange); 2^n is put together from its exponent bits.
inline float simd_exp(float x) {
  using namespace exp_constants;
  const float shifted = __builtin_fmaf(x, kLog2E, kRound);
  const float n = shifted - kRound;
  const float r = __builtin_fmaf(-n, kLn2Low, __builtin_fmaf(-n, kLn2High, x));
  float p = __builtin_fmaf(kP4, r, kP3);
  p = __builtin_fmaf(p, r, kP2);
  p = __builtin_fmaf(p, r, kP1);
  p = __builtin_fmaf(p, r, kP0);
  const float fraction = __builtin_fmaf(r * r, p, r) + 1.0f;
  const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  const float bounded = x > 88.0f ? __builtin_inff() : fraction * power;
  return x < -87.0f ? 0.0f : bounded;
}

// The same of a register, for x up to 88. Fused multiply-adds where the file is compiled with -ffp-contract=fast.
inline void simd_exp(Lanes& out, const Lanes& x) {
  using namespace exp_constants;
  const Lanes shifted = x * kLog2E + kRound;
  const Lanes n = shifted - kRound;
  const Lanes r = (x - n * kLn2High) - n * kLn2Low;
  const Lanes p = (((r * kP4 + kP3) * r + kP2) * r + kP1) * r + kP0;
  const Lanes fraction = r * r * p + r + 1.0f;
  const Lanes power = reinterpret_cast<Lanes>((reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u);
  const Words is_zero = reinterpret_cast<Words>(x < -87.0f);
  out = reinterpret_cast<Lanes>(reinterpret_cast<Words>(fraction * power) & ~is_zero);
}

// 1 / (1 + e^-x).
inline float simd_logistic(float x) { return 1.0f / (1.0f + simd_exp(-x)); }
