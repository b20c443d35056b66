// lanes.h: arithmetic on 32 lanes at a time. Every handler computes all lanes and keeps those of the mask.
#pragma once
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "tests/ptx/machine.h"

namespace ptx {

template <typename T>
inline T bits_as(auto value) {
  static_assert(sizeof(T) == sizeof value);
  T out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

// Registers of 8 and 16 bits have lanes of 32.
template <typename T>
using Lane = std::conditional_t<(sizeof(T) < 4), uint32_t, T>;
template <typename T>
inline T from_lane(Lane<T> x) {
  return static_cast<T>(x);
}
template <typename T>
inline Lane<T> to_lane(T x) {
  if constexpr (sizeof(T) < 4)
    return static_cast<uint32_t>(static_cast<std::make_unsigned_t<T>>(x));
  else
    return x;
}

template <typename L>
inline const L* src(const Warp& w, const Place& o) {
  return reinterpret_cast<const L*>(w.base[o.base] + o.off);
}
template <typename L>
inline L* dst(const Warp& w, const Place& o) {
  return reinterpret_cast<L*>(w.base[0] + o.off);
}

template <typename L>
inline void put(Warp& w, const Place& o, const L* r, uint32_t m, uint32_t defined) {
  L* const d = dst<L>(w, o);
  if (m == ~0u) {
    std::memcpy(d, r, 32 * sizeof(L));
    w.def[o.slot] = defined;
  } else {
    for (int l = 0; l < 32; ++l) d[l] = (m >> l & 1) ? r[l] : d[l];
    w.def[o.slot] = (w.def[o.slot] & ~m) | (defined & m);
  }
}
inline void put_pred(Warp& w, int p, uint32_t value, uint32_t m, uint32_t defined) {
  w.pred[p] = (w.pred[p] & ~m) | (value & m);
  w.pdef[p] = (w.pdef[p] & ~m) | (defined & m);
}

// D: type of the result, S: of the operands.
template <typename D, typename S, typename F>
void unary(Warp& w, Instruction& i, uint32_t m) {
  const Lane<S>* const a = src<Lane<S>>(w, i.operands[1]);
  alignas(64) Lane<D> r[32];
  for (int l = 0; l < 32; ++l) r[l] = to_lane<D>(F::f(from_lane<S>(a[l])));
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot]);
}
template <typename D, typename S, typename F>
void binary(Warp& w, Instruction& i, uint32_t m) {
  const Lane<S>* const a = src<Lane<S>>(w, i.operands[1]);
  const Lane<S>* const b = src<Lane<S>>(w, i.operands[2]);
  alignas(64) Lane<D> r[32];
  for (int l = 0; l < 32; ++l) r[l] = to_lane<D>(F::f(from_lane<S>(a[l]), from_lane<S>(b[l])));
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot]);
}
// C: type of the third operand.
template <typename D, typename S, typename C, typename F>
void ternary(Warp& w, Instruction& i, uint32_t m) {
  const Lane<S>* const a = src<Lane<S>>(w, i.operands[1]);
  const Lane<S>* const b = src<Lane<S>>(w, i.operands[2]);
  const Lane<C>* const c = src<Lane<C>>(w, i.operands[3]);
  alignas(64) Lane<D> r[32];
  for (int l = 0; l < 32; ++l) r[l] = to_lane<D>(F::f(from_lane<S>(a[l]), from_lane<S>(b[l]), from_lane<C>(c[l])));
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot] & w.def[i.operands[3].slot]);
}
// The second operand of a shift is 32 bits.
template <typename S, typename F>
void shift(Warp& w, Instruction& i, uint32_t m) {
  const Lane<S>* const a = src<Lane<S>>(w, i.operands[1]);
  const uint32_t* const b = src<uint32_t>(w, i.operands[2]);
  alignas(64) Lane<S> r[32];
  for (int l = 0; l < 32; ++l) r[l] = to_lane<S>(F::f(from_lane<S>(a[l]), b[l]));
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot]);
}

template <Handler H, int kMode>
void rounded(Warp& w, Instruction& i, uint32_t m) {
  std::fesetround(kMode);
  H(w, i, m);
  std::fesetround(FE_TONEAREST);
}

// The 4 or 8 bytes of one lane.
inline uint64_t lane_bits(const Warp& w, const Place& o, int l) {
  return o.wide ? src<uint64_t>(w, o)[l] : src<uint32_t>(w, o)[l];
}

}  // namespace ptx
