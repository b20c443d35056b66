// lanes.h: a register's worth of fp32 numbers, from memory and to it, as a type that compilers keep in registers: for
// loops that they would not vectorise, or not well.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/tensor.h"

// One register with AVX-512 and AVX, several where registers are shorter.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

// Copies: loops as short as this one compilers do not vectorise.
inline void load_all(Lanes& out, const float* from) { std::memcpy(&out, from, sizeof out); }
inline void store_all(float* to, const Lanes& in) { std::memcpy(to, &in, sizeof in); }

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline void load_all(Lanes& out, const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  out = reinterpret_cast<Lanes>(__builtin_convertvector(halves, Words) << 16);
}

// As from_float<bf16>() rounds.
inline void store_all(bf16* to, const Lanes& in) {
  const Words bits = reinterpret_cast<Words>(in);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words kept = in != in ? bits | 0x00400000u : rounded;
  const Halves halves = __builtin_convertvector(kept >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// `count` numbers, at most kLanes; 0 after them.
template <typename T>
inline void load_lanes(Lanes& out, const T* from, int64_t count) {
  if (count == kLanes) {
    load_all(out, from);
    return;
  }
  T values[kLanes] = {};
  std::copy_n(from, count, values);
  load_all(out, values);
}

template <typename T>
inline void store_lanes(T* to, int64_t count, const Lanes& in) {
  if (count == kLanes) {
    store_all(to, in);
    return;
  }
  T values[kLanes];
  store_all(values, in);
  std::copy_n(values, count, to);
}

// f(i, numbers from i on, at most kLanes) for all of [0, count).
template <typename F>
inline void for_each_lanes(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, count - i);
}

#if defined(__AVX512F__)
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#endif

// Two registers become (a[0], b[0], a[1], b[1], ...).
inline void interleave(Lanes& low, Lanes& high, const Lanes& a, const Lanes& b) {
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, LOW_HALVES);
  high = __builtin_shufflevector(a, b, HIGH_HALVES);
#else
  typedef int32_t Places __attribute__((vector_size(4 * kLanes)));
  low = __builtin_shuffle(a, b, Places{LOW_HALVES});
  high = __builtin_shuffle(a, b, Places{HIGH_HALVES});
#endif
}
#undef LOW_HALVES
#undef HIGH_HALVES

struct SquareTile {
  Lanes rows[kLanes];
};

// Rows become columns: each interleaving of row i with row i + half moves one bit of the number of a row into that of a
// column.
inline void transpose(SquareTile& tile) {
  constexpr int kHalf = kLanes / 2;
#pragma GCC unroll 4
  for (int bit = 1; bit < kLanes; bit *= 2) {
    SquareTile next;
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i)
      interleave(next.rows[2 * i], next.rows[2 * i + 1], tile.rows[i], tile.rows[i + kHalf]);
    tile = next;
  }
}
