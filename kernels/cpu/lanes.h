// lanes.h: a register's worth of fp32 numbers, from memory and to it, as a type that compilers keep in registers: for
// loops that they would not vectorise, or not well.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels/cpu/prefetch.h"
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

// The larger or smaller of each pair; the second where one is not a number. One instruction with AVX-512, of which GCC
// makes a comparison and a selection. (The forms with a mask of all ones: GCC 12 warns of the others.)
inline void larger(Lanes& out, const Lanes& a, const Lanes& b) {
#if defined(__AVX512F__)
  out = reinterpret_cast<Lanes>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  out = a > b ? a : b;
#endif
}

inline void smaller(Lanes& out, const Lanes& a, const Lanes& b) {
#if defined(__AVX512F__)
  out = reinterpret_cast<Lanes>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  out = a < b ? a : b;
#endif
}

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline void load_all(Lanes& out, const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  out = reinterpret_cast<Lanes>(__builtin_convertvector(halves, Words) << 16);
}

// The rounded number's bits are the upper half of each word, as those of from_float<bf16>(); the lower half is
// undefined.
inline void to_bf16_words(Words& out, const Lanes& in) {
  const Words bits = reinterpret_cast<Words>(in);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out = in != in ? bits | 0x00400000u : rounded;
}

inline void store_all(bf16* to, const Lanes& in) {
  Words words;
  to_bf16_words(words, in);
  const Halves halves = __builtin_convertvector(words >> 16, Halves);
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

// Two registers of neighbouring numbers. bf16 come as the even and the odd ones, which takes no instruction that moves
// numbers across a register: for work on each number by itself.
static_assert(std::endian::native == std::endian::little);
struct LanePair {
  Lanes first, second;
};

inline void load_pair(LanePair& out, const float* from) {
  load_all(out.first, from);
  load_all(out.second, from + kLanes);
}

inline void store_pair(float* to, const LanePair& in) {
  store_all(to, in.first);
  store_all(to + kLanes, in.second);
}

inline void load_pair(LanePair& out, const bf16* from) {
  Words both;
  std::memcpy(&both, from, sizeof both);
  out.first = reinterpret_cast<Lanes>(both << 16);
  out.second = reinterpret_cast<Lanes>(both & 0xffff0000u);
}

inline void store_pair(bf16* to, const LanePair& in) {
  Words even, odd;
  to_bf16_words(even, in.first);
  to_bf16_words(odd, in.second);
  const Words both = even >> 16 | (odd & 0xffff0000u);
  std::memcpy(to, &both, sizeof both);
}

// f(out, in...) on registers, for `count` numbers; `out` may be one of `in`. Arrays of one type go in pairs, and what
// lies behind bf16 numbers is asked for, for them and for the caller's next row; where that is of no use it costs
// nothing measurable.
template <typename T, typename F, typename... In>
inline void map_numbers(int64_t count, F&& f, T* out, const In*... in) {
  const auto for_pieces = [&]<size_t... at>(std::index_sequence<at...>) {
    int64_t i = 0;
    if constexpr ((std::is_same_v<T, In> && ...)) {
      for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        if constexpr (sizeof(T) == 2) (__builtin_prefetch(in + i + kPrefetchAhead<T>, 0, 2), ...);
        LanePair result, pairs[sizeof...(In)];
        (load_pair(pairs[at], in + i), ...);
        f(result.first, pairs[at].first...);
        f(result.second, pairs[at].second...);
        store_pair(out + i, result);
      }
    }
    for (; i < count; i += kLanes) {
      const int64_t used = std::min<int64_t>(kLanes, count - i);
      Lanes result, lanes[sizeof...(In)];
      (load_lanes(lanes[at], in + i, used), ...);
      f(result, lanes[at]...);
      store_lanes(out + i, used, result);
    }
  };
  for_pieces(std::index_sequence_for<In...>{});
}

// Several, so that no number waits for the sum, or maximum, with the last.
struct Accumulators {
  Lanes lanes[4];

  float sum() const {
    Lanes all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) all[l] += all[l + half];
    return all[0];
  }

  float maximum() const {
    Lanes all = lanes[0];
    for (int i = 1; i < 4; ++i) larger(all, lanes[i], all);
    for (int l = 1; l < kLanes; ++l) all[0] = std::max(all[0], all[l]);
    return all[0];
  }
};

// f(accumulator, numbers) on registers, for `count` numbers.
template <typename T, typename F>
inline void accumulate_numbers(Accumulators& out, int64_t count, F&& f, const T* in) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    LanePair pairs[2];
    load_pair(pairs[0], in + i);
    load_pair(pairs[1], in + i + 2 * kLanes);
    f(out.lanes[0], pairs[0].first);
    f(out.lanes[1], pairs[0].second);
    f(out.lanes[2], pairs[1].first);
    f(out.lanes[3], pairs[1].second);
  }
  for (; i < count; i += kLanes) {
    const int64_t used = std::min<int64_t>(kLanes, count - i);
    Lanes numbers, updated = out.lanes[0];
    load_lanes(numbers, in + i, used);
    f(updated, numbers);
    if (used == kLanes) {
      out.lanes[0] = updated;
    } else {
      for (int64_t l = 0; l < used; ++l) out.lanes[0][l] = updated[l];
    }
  }
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
