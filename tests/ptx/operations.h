// operations.h: what instructions compute for one thread.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "tests/ptx/lanes.h"

namespace ptx {

inline float widened(uint32_t bf16) { return bits_as<float>(bf16 << 16); }

// ---- integers (-fwrapv)

template <typename T>
using Wide =
    std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

struct Add {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a - b);
  }
};
struct MulLo {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(static_cast<Wide<T>>(a) * b);
  }
};
struct MulHi {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>((static_cast<Wide<T>>(a) * b) >> 8 * sizeof(T));
  }
};
struct MulWide {
  template <class T>
  static Wide<T> f(T a, T b) {
    return static_cast<Wide<T>>(a) * b;
  }
};
struct MadLo {
  template <class T>
  static T f(T a, T b, T c) {
    return static_cast<T>(MulLo::f(a, b) + c);
  }
};
struct MadHi {
  template <class T>
  static T f(T a, T b, T c) {
    return static_cast<T>(MulHi::f(a, b) + c);
  }
};
struct MadWide {
  template <class T>
  static Wide<T> f(T a, T b, Wide<T> c) {
    return static_cast<Wide<T>>(a) * b + c;
  }
};
struct Div {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - a);
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  static T f(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    return a > b ? a : b;
  }
};
struct Abs {
  template <class T>
  static T f(T a) {
    return a < 0 ? static_cast<T>(0 - a) : a;
  }
};
struct Neg {
  template <class T>
  static T f(T a) {
    return static_cast<T>(0 - a);
  }
};
struct And {
  template <class T>
  static T f(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T f(T a) {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  static T f(T a) {
    return a == 0 ? 1 : 0;
  }
};
struct Move {
  template <class T>
  static T f(T a) {
    return a;
  }
};
struct Shl {
  template <class T>
  static T f(T a, uint32_t b) {
    return b >= 8 * sizeof(T) ? 0 : static_cast<T>(a << b);
  }
};
struct Shr {
  template <class T>
  static T f(T a, uint32_t b) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    if (std::is_signed_v<T>) return static_cast<T>(a >> (b >= kBits ? kBits - 1 : b));
    return b >= kBits ? 0 : static_cast<T>(a >> b);
  }
};
struct Popc {
  template <class T>
  static uint32_t f(T a) {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct Clz {
  template <class T>
  static uint32_t f(T a) {
    return a == 0           ? 8 * sizeof(T)
           : sizeof(T) == 8 ? static_cast<uint32_t>(__builtin_clzll(a))
                            : static_cast<uint32_t>(__builtin_clz(static_cast<uint32_t>(a)));
  }
};
struct Brev {
  template <class T>
  static T f(T a) {
    T r = 0;
    for (size_t k = 0; k < 8 * sizeof(T); ++k) r |= static_cast<T>((a >> k & 1) << (8 * sizeof(T) - 1 - k));
    return r;
  }
};
// ---- floating point

inline float flush(float x) {
  return (bits_as<uint32_t>(x) & 0x7f800000u) == 0 ? bits_as<float>(bits_as<uint32_t>(x) & 0x80000000u) : x;
}
inline double flush(double x) { return x; }
inline float canonical(float x) { return x != x ? bits_as<float>(0x7fffffffu) : x; }
inline double canonical(double x) { return x != x ? bits_as<double>(0x7fffffffffffffffull) : x; }
template <bool kFtz, bool kSat, typename T>
inline T finish(T x) {
  if constexpr (kSat)
    x = x > 0 ? (x < 1 ? x : T(1)) : T(0);  // NaN gives 0
  else
    x = canonical(x);
  return kFtz ? flush(x) : x;
}
template <bool kFtz, typename T>
inline T take(T x) {
  return kFtz ? flush(x) : x;
}

// The approximate instructions may be wrong by an ulp or two; with PTXSIM_NOISE they are.
inline float noisy(float r, float x) {
  if (!machine.noise || !(std::fabs(r) < std::numeric_limits<float>::infinity()) ||
      std::fabs(r) < std::numeric_limits<float>::min())
    return r;
  uint32_t h = bits_as<uint32_t>(x) * 0x9e3779b9u;
  h ^= h >> 15;
  return bits_as<float>(bits_as<uint32_t>(r) + static_cast<uint32_t>(static_cast<int>(h % 5) - 2));
}

struct FAdd {
  template <class T>
  static T f(T a, T b) {
    return a + b;
  }
};
struct FSub {
  template <class T>
  static T f(T a, T b) {
    return a - b;
  }
};
struct FMul {
  template <class T>
  static T f(T a, T b) {
    return a * b;
  }
};
struct FDiv {
  template <class T>
  static T f(T a, T b) {
    return a / b;
  }
};
struct FDivApprox {
  static float f(float a, float b) { return noisy(a / b, b); }
};
struct FFma {
  static float f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double f(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct FRcp {
  template <class T>
  static T f(T a) {
    return T(1) / a;
  }
};
struct FSqrt {
  static float f(float a) { return __builtin_sqrtf(a); }
  static double f(double a) { return __builtin_sqrt(a); }
};
struct FRcpApprox {
  static float f(float a) { return noisy(static_cast<float>(1.0 / a), a); }
};
struct FSqrtApprox {
  static float f(float a) { return noisy(std::sqrt(a), a); }
};
struct FRsqrtApprox {
  static float f(float a) { return noisy(static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))), a); }
};
struct FEx2 {
  static float f(float a) { return noisy(static_cast<float>(std::exp2(static_cast<double>(a))), a); }
};
struct FLg2 {
  static float f(float a) { return noisy(static_cast<float>(std::log2(static_cast<double>(a))), a); }
};
struct FTanh {
  static float f(float a) { return noisy(std::tanh(a), a); }
};
struct FSin {
  static float f(float a) { return static_cast<float>(std::sin(static_cast<double>(a))); }
};
struct FCos {
  static float f(float a) { return static_cast<float>(std::cos(static_cast<double>(a))); }
};
// One operand NaN: the other one. +0 is above -0.
template <bool kMax, bool kNan>
struct FExtreme {
  template <class T>
  static T f(T a, T b) {
    using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    if (kNan && (a != a || b != b)) return canonical(std::numeric_limits<T>::quiet_NaN());
    if (a != a) return canonical(b);
    if (b != b) return a;
    if (a == b) return kMax ? bits_as<T>(bits_as<U>(a) & bits_as<U>(b)) : bits_as<T>(bits_as<U>(a) | bits_as<U>(b));
    return (kMax ? a > b : a < b) ? a : b;
  }
};
struct FAbs {
  template <class T>
  static T f(T a) {
    return std::fabs(a);
  }
};
struct FNeg {
  template <class T>
  static T f(T a) {
    return -a;
  }
};

// With flushing, saturation and canonical NaN around them.
template <typename F, bool kFtz, bool kSat = false>
struct Float {
  template <class T>
  static T f(T a) {
    return finish<kFtz, kSat>(F::f(take<kFtz>(a)));
  }
  template <class T>
  static T f(T a, T b) {
    return finish<kFtz, kSat>(F::f(take<kFtz>(a), take<kFtz>(b)));
  }
  template <class T>
  static T f(T a, T b, T c) {
    return finish<kFtz, kSat>(F::f(take<kFtz>(a), take<kFtz>(b), take<kFtz>(c)));
  }
};

// ---- comparisons: masks

struct Eq {
  template <class T>
  static bool f(T a, T b) {
    return a == b;
  }
};
struct Ne {
  template <class T>
  static bool f(T a, T b) {
    return std::is_floating_point_v<T> ? (a < b || a > b) : a != b;
  }
};
struct Lt {
  template <class T>
  static bool f(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool f(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool f(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool f(T a, T b) {
    return a >= b;
  }
};
struct Equ {
  template <class T>
  static bool f(T a, T b) {
    return !(a < b || a > b);
  }
};
struct Neu {
  template <class T>
  static bool f(T a, T b) {
    return !(a == b);
  }
};
struct Ltu {
  template <class T>
  static bool f(T a, T b) {
    return !(a >= b);
  }
};
struct Leu {
  template <class T>
  static bool f(T a, T b) {
    return !(a > b);
  }
};
struct Gtu {
  template <class T>
  static bool f(T a, T b) {
    return !(a <= b);
  }
};
struct Geu {
  template <class T>
  static bool f(T a, T b) {
    return !(a < b);
  }
};
struct Num {
  template <class T>
  static bool f(T a, T b) {
    return a == a && b == b;
  }
};
struct Nan {
  template <class T>
  static bool f(T a, T b) {
    return a != a || b != b;
  }
};

// setp with an optional combination (mode: 0 none, 1 and, 2 or, 3 xor) with a predicate.
template <typename S, typename F>
void compare(Warp& w, Instruction& i, uint32_t m) {
  const Lane<S>* const a = src<Lane<S>>(w, i.operands[0]);
  const Lane<S>* const b = src<Lane<S>>(w, i.operands[1]);
  uint32_t r = 0;
  if constexpr (std::is_same_v<S, float>) {
    const bool ftz = i.x & 1;
    for (int l = 0; l < 32; ++l)
      r |= static_cast<uint32_t>(ftz ? F::f(flush(a[l]), flush(b[l])) : F::f(a[l], b[l])) << l;
  } else {
    for (int l = 0; l < 32; ++l) r |= static_cast<uint32_t>(F::f(from_lane<S>(a[l]), from_lane<S>(b[l]))) << l;
  }
  uint32_t defined = w.def[i.operands[0].slot] & w.def[i.operands[1].slot], other = ~r;
  if (i.mode != 0) {
    uint32_t q = w.pred[i.predicate_in];
    if (i.predicate_in_negated) q = ~q;
    const uint32_t qd = w.pdef[i.predicate_in];
    // A known false in an `and`, a known true in an `or` decide alone.
    if (i.mode == 1)
      defined = (defined & qd) | (defined & ~r) | (qd & ~q);
    else if (i.mode == 2)
      defined = (defined & qd) | (defined & r) | (qd & q);
    else
      defined &= qd;
    const auto combine = [&](uint32_t c) { return i.mode == 1 ? c & q : i.mode == 2 ? c | q : c ^ q; };
    other = combine(~r);
    r = combine(r);
  }
  if (i.predicate_out >= 0) put_pred(w, i.predicate_out, r, m, defined);
  if (i.predicate_out2 >= 0) put_pred(w, i.predicate_out2, other, m, defined);
}

}  // namespace ptx
