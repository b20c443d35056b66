// simd_math.h: powers of two and the logistic function of a register, from multiplications, additions and bit
// operations (libm's take one number at a time). e^x is 2^(x log2 e): attention and GELU have the factor in one they
// multiply by anyway; to multiply x by it costs a relative error of up to 6e-8 |x|. Fused multiply-adds where the file
// is compiled with -ffp-contract=fast (Makefile).
#pragma once

#include <numbers>

#include "kernels/cpu/lanes.h"

inline constexpr float kLog2E = std::numbers::log2e_v<float>, kLn2 = std::numbers::ln2_v<float>;

// 2^x with a relative error below 2e-7; 0 below -126.5, infinity from 127.5 on, NaN for NaN.
// x = n + r with |r| <= 1/2; 2^r = 1 + r p(r), p the polynomial of degree 5 that makes the largest relative error
// smallest (2e-8 with these coefficients; found by linear programming on 4,001 points); 2^n is put together from its
// exponent bits.
inline void simd_exp2(Lanes& out, const Lanes& x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  Lanes bounded;
  larger(bounded, Lanes{} - 127.0f, x);
  smaller(bounded, Lanes{} + 128.0f, bounded);
  const Lanes shifted = bounded + kRound;
  const Lanes r = bounded - (shifted - kRound);
  Lanes p = r * 0.0001535336196f + 0.001339887385f;
  p = p * r + 0.009618436918f;
  p = p * r + 0.05550332367f;
  p = p * r + 0.2402264774f;
  p = p * r + 0.6931471825f;
  p = p * r + 1.0f;
  out = p * reinterpret_cast<Lanes>((reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u);
}

// 1 / (1 + 2^x): the logistic function of -x ln 2.
inline void simd_logistic2(Lanes& out, const Lanes& x) {
  simd_exp2(out, x);
  out = 1.0f / (1.0f + out);
}
