// convert.cpp: conversions between types.
#include "tests/ptx/operations.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

uint16_t bf16_of(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

void convert_bf16x2(Warp& w, Instruction& i, uint32_t m) {
  const float* const high = src<float>(w, i.operands[1]);
  const float* const low = src<float>(w, i.operands[2]);
  alignas(64) uint32_t r[32];
  for (int l = 0; l < 32; ++l) r[l] = static_cast<uint32_t>(bf16_of(high[l])) << 16 | bf16_of(low[l]);
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot]);
}

namespace {

bool is_float(Type t) { return t == F32 || t == F64 || t == BF16 || t == F16; }

double round_to_integral(double x, int mode) {
  switch (mode) {
    case RN: return std::nearbyint(x);
    case RZ: return std::trunc(x);
    case RM: return std::floor(x);
    default: return std::ceil(x);
  }
}

// A number of `bits` bits, clamped to it when it is out of range.
uint64_t clamp_to(double x, Type to) {
  if (x != x) return 0;
  const int bits = 8 * size_of(to);
  const double high = std::ldexp(1.0, is_signed(to) ? bits - 1 : bits);
  const uint64_t mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
  if (is_signed(to)) {
    if (x >= high) return mask >> 1;
    if (x < -high) return (mask >> 1) + 1;
    return static_cast<uint64_t>(static_cast<int64_t>(x)) & mask;
  }
  if (x >= high) return mask;
  if (x <= -1) return 0;
  return x < 0 ? 0 : static_cast<uint64_t>(x);
}

}  // namespace

// ty: of the result, ty2: of the operand; rnd: rounding; mode: 1 saturate, 2 flush, 4 round to an integral value.
void convert(Warp& w, Instruction& i, uint32_t m) {
  const Place &d = i.operands[0], &s = i.operands[1];
  const Type to = i.ty, from = i.ty2;
  const int in_bits = 8 * size_of(from);
  alignas(64) uint64_t r[32] = {};
  static const int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  for (uint32_t rest = m; rest; rest &= rest - 1) {
    const int l = first_lane(rest);
    uint64_t in = s.wide ? src<uint64_t>(w, s)[l] : src<uint32_t>(w, s)[l];
    if (in_bits < 64) in &= (1ull << in_bits) - 1;
    uint64_t out = 0;
    if (!is_float(from)) {
      const int64_t value =
          is_signed(from) ? static_cast<int64_t>(in << (64 - in_bits)) >> (64 - in_bits) : static_cast<int64_t>(in);
      if (!is_float(to)) {
        out = static_cast<uint64_t>(value);
        if (i.mode & 1) {
          const int bits = 8 * size_of(to);
          const bool negative = is_signed(from) && value < 0;
          const uint64_t top = is_signed(to) ? (1ull << (bits - 1)) - 1 : bits == 64 ? ~0ull : (1ull << bits) - 1;
          if (negative)
            out = !is_signed(to) ? 0 : value < -static_cast<int64_t>(top) - 1 ? ~top : out;
          else if (static_cast<uint64_t>(value) > top)
            out = top;
        }
      } else {
        std::fesetround(kModes[i.rounding]);
        if (to == F32) {
          volatile float f =
              is_signed(from) ? static_cast<float>(value) : static_cast<float>(static_cast<uint64_t>(value));
          out = bits_as<uint32_t>(static_cast<float>(f));
        } else {
          volatile double f =
              is_signed(from) ? static_cast<double>(value) : static_cast<double>(static_cast<uint64_t>(value));
          out = bits_as<uint64_t>(static_cast<double>(f));
        }
        std::fesetround(FE_TONEAREST);
        if (to == BF16 || to == F16) fail("cvt from an integer to 16 bits: " + i.text);
      }
    } else {
      double x = from == F64    ? bits_as<double>(in)
                 : from == F32  ? bits_as<float>(static_cast<uint32_t>(in))
                 : from == BF16 ? widened(static_cast<uint32_t>(in))
                                : 0;
      if (from == F16 || to == F16) fail("cvt of f16: " + i.text);
      if ((i.mode & 2) && from == F32) x = flush(static_cast<float>(x));
      if (!is_float(to)) {
        out = clamp_to(round_to_integral(x, i.rounding), to);
      } else {
        if (i.mode & 4) x = round_to_integral(x, i.rounding);
        if (i.mode & 1) x = x > 0 ? (x < 1 ? x : 1.0) : 0.0;
        if (to == F32) {
          std::fesetround(kModes[i.mode & 4 ? 0 : i.rounding]);
          volatile float f = static_cast<float>(x);
          std::fesetround(FE_TONEAREST);
          float g = canonical(static_cast<float>(f));
          if (i.mode & 2) g = flush(g);
          out = bits_as<uint32_t>(g);
        } else if (to == F64) {
          out = bits_as<uint64_t>(canonical(x));
        } else {
          if (from == F64 || i.rounding != RN) fail("this form of cvt to bf16: " + i.text);
          out = bf16_of(static_cast<float>(x));
        }
      }
    }
    // Into a wider register: extended by the sign of the result's type.
    const int out_bits = 8 * size_of(to);
    if (out_bits < 64) {
      out &= (1ull << out_bits) - 1;
      if (is_signed(to) && d.wide)
        out = static_cast<uint64_t>(static_cast<int64_t>(out << (64 - out_bits)) >> (64 - out_bits));
      else if (is_signed(to) && out_bits < 16)
        out = static_cast<uint64_t>(static_cast<int64_t>(out << (64 - out_bits)) >> (64 - out_bits));
    }
    r[l] = out;
  }
  if (d.wide)
    put(w, d, r, m, w.def[s.slot]);
  else {
    alignas(64) uint32_t narrow[32];
    for (int l = 0; l < 32; ++l) narrow[l] = static_cast<uint32_t>(r[l]);
    put(w, d, narrow, m, w.def[s.slot]);
  }
}

}  // namespace ptx
