// decode_arithmetic.cpp: sums and products, roots, comparisons, conversions.
#include <algorithm>
#include <functional>
#include <map>

#include "tests/ptx/decoder.h"
#include "tests/ptx/integer_handlers.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

namespace {

// ---- families of handlers by type; nullptr: not for this type

template <typename F>
Handler any_compare(Type t) {
  switch (t) {
    case U16:
    case B16: return compare<uint16_t, F>;
    case S16: return compare<int16_t, F>;
    case U32:
    case B32: return compare<uint32_t, F>;
    case S32: return compare<int32_t, F>;
    case U64:
    case B64: return compare<uint64_t, F>;
    case S64: return compare<int64_t, F>;
    case F32: return compare<float, F>;
    case F64: return compare<double, F>;
    default: return nullptr;
  }
}

template <typename F>
Handler float_unary(Type t, bool ftz, bool sat) {
  if (t == F64) return ftz || sat ? nullptr : unary<double, double, Float<F, false>>;
  if (t != F32) return nullptr;
  return ftz   ? sat ? unary<float, float, Float<F, true, true>> : unary<float, float, Float<F, true>>
           : sat ? unary<float, float, Float<F, false, true>>
               : unary<float, float, Float<F, false>>;
}

template <typename F>
Handler approximate(Type t, bool ftz) {
  return t != F32 ? nullptr : ftz ? unary<float, float, Float<F, true>> : unary<float, float, Float<F, false>>;
}

template <typename F>
Handler float_binary(Type t, bool ftz, bool sat, int rnd) {
  if (t == F64 && !ftz && !sat) {
    switch (rnd) {
      case RN: return binary<double, double, Float<F, false>>;
      case RZ: return rounded<binary<double, double, Float<F, false>>, FE_TOWARDZERO>;
      case RM: return rounded<binary<double, double, Float<F, false>>, FE_DOWNWARD>;
      default: return rounded<binary<double, double, Float<F, false>>, FE_UPWARD>;
    }
  }
  if (t != F32) return nullptr;
  if (rnd == RN) {
    return ftz   ? sat ? binary<float, float, Float<F, true, true>> : binary<float, float, Float<F, true>>
             : sat ? binary<float, float, Float<F, false, true>>
                 : binary<float, float, Float<F, false>>;
  }
  if (sat) return nullptr;
  switch (rnd) {
    case RZ:
      return ftz ? rounded<binary<float, float, Float<F, true>>, FE_TOWARDZERO>
                 : rounded<binary<float, float, Float<F, false>>, FE_TOWARDZERO>;
    case RM:
      return ftz ? rounded<binary<float, float, Float<F, true>>, FE_DOWNWARD>
                 : rounded<binary<float, float, Float<F, false>>, FE_DOWNWARD>;
    default:
      return ftz ? rounded<binary<float, float, Float<F, true>>, FE_UPWARD>
                 : rounded<binary<float, float, Float<F, false>>, FE_UPWARD>;
  }
}

Handler fma_handler(Type t, bool ftz, bool sat, int rnd) {
  using P = Float<FFma, false>;
  using Z = Float<FFma, true>;
  if (t == F64 && !ftz && !sat) {
    constexpr Handler h = ternary<double, double, double, P>;
    return rnd == RN   ? h
           : rnd == RZ ? rounded<h, FE_TOWARDZERO>
           : rnd == RM ? rounded<h, FE_DOWNWARD>
                       : rounded<h, FE_UPWARD>;
  }
  if (t != F32) return nullptr;
  if (sat)
    return rnd != RN ? nullptr
           : ftz     ? ternary<float, float, float, Float<FFma, true, true>>
                     : ternary<float, float, float, Float<FFma, false, true>>;
  constexpr Handler p = ternary<float, float, float, P>, z = ternary<float, float, float, Z>;
  switch (rnd) {
    case RN: return ftz ? z : p;
    case RZ: return ftz ? rounded<z, FE_TOWARDZERO> : rounded<p, FE_TOWARDZERO>;
    case RM: return ftz ? rounded<z, FE_DOWNWARD> : rounded<p, FE_DOWNWARD>;
    default: return ftz ? rounded<z, FE_UPWARD> : rounded<p, FE_UPWARD>;
  }
}

template <typename D, typename S>
struct IntCast {
  static D f(S x) { return static_cast<D>(x); }
};

// The conversions between integers that occur most.
Handler quick_convert(Type to, Type from) {
  if (to == S64 && from == S32) return unary<int64_t, int32_t, IntCast<int64_t, int32_t>>;
  if (to == U64 && from == U32) return unary<uint64_t, uint32_t, IntCast<uint64_t, uint32_t>>;
  if (to == U32 && from == U64) return unary<uint32_t, uint64_t, IntCast<uint32_t, uint64_t>>;
  if (to == U32 && from == U16) return unary<uint32_t, uint16_t, IntCast<uint32_t, uint16_t>>;
  if (to == U16 && from == U32) return unary<uint16_t, uint32_t, IntCast<uint16_t, uint32_t>>;
  if (to == U64 && from == U16) return unary<uint64_t, uint16_t, IntCast<uint64_t, uint16_t>>;
  return nullptr;
}

}  // namespace

void Decoder::add_or_extreme() {
  const bool approx_ftz = take("ftz");
  const bool sat = take("sat"), nan = take("NaN");
  const int rnd = take_rounding();
  const Type t = take_type();
  same(t, 2);
  if (t == F32 || t == F64) {
    if (root == "add") return handler(float_binary<FAdd>(t, approx_ftz, sat, rnd));
    if (root == "sub") return handler(float_binary<FSub>(t, approx_ftz, sat, rnd));
    if (root == "min")
      return handler(nan ? float_binary<FExtreme<false, true>>(t, approx_ftz, false, RN)
                         : float_binary<FExtreme<false, false>>(t, approx_ftz, false, RN));
    return handler(nan ? float_binary<FExtreme<true, true>>(t, approx_ftz, false, RN)
                       : float_binary<FExtreme<true, false>>(t, approx_ftz, false, RN));
  }
  if (sat || nan || approx_ftz) bad("not supported");
  return handler(root == "add"   ? int_binary<Add>(t)
                 : root == "sub" ? int_binary<Sub>(t)
                 : root == "min" ? int_binary<Min>(t)
                                 : int_binary<Max>(t));
}

void Decoder::multiply() {
  const bool ftz = take("ftz"), sat = take("sat");
  const bool lo = take("lo"), hi = take("hi"), wide = take("wide");
  const int rnd = take_rounding();
  const Type t = take_type();
  const size_t sources = root == "mul" ? 2 : 3;
  if (t == F32 || t == F64) {
    same(t, sources);
    if (root == "mul") return handler(float_binary<FMul>(t, ftz, sat, rnd));
    return handler(fma_handler(t, ftz, sat, rnd));
  }
  if (ftz || sat || root == "fma") bad("not supported");
  if (wide) {
    count(sources + 1);
    const int bytes = size_of(t) == 4 ? 8 : 4;
    dest(operands()[0], bytes);
    source(operands()[1], 4), source(operands()[2], 4);
    if (sources == 3) source(operands()[3], bytes);
    if (root == "mul")
      return handler(t == S32   ? binary<int64_t, int32_t, MulWide>
                     : t == U32 ? binary<uint64_t, uint32_t, MulWide>
                     : t == S16 ? binary<int32_t, int16_t, MulWide>
                     : t == U16 ? binary<uint32_t, uint16_t, MulWide>
                                : Handler{});
    return handler(t == S32   ? ternary<int64_t, int32_t, int64_t, MadWide>
                   : t == U32 ? ternary<uint64_t, uint32_t, uint64_t, MadWide>
                   : t == S16 ? ternary<int32_t, int16_t, int32_t, MadWide>
                   : t == U16 ? ternary<uint32_t, uint16_t, uint32_t, MadWide>
                              : Handler{});
  }
  same(t, sources);
  if (lo == hi) bad("neither .lo nor .hi");
  if (root == "mul") return handler(lo ? int_binary<MulLo>(t) : int_binary<MulHi>(t));
  return handler(lo ? int_ternary<MadLo>(t) : int_ternary<MadHi>(t));
}

void Decoder::divide() {
  const bool ftz = take("ftz"), full = take("full"), approx = take("approx");
  const int rnd = take_rounding();
  const Type t = take_type();
  same(t, 2);
  if (t == F32 && (full || approx)) return handler(float_binary<FDivApprox>(t, ftz, false, RN));
  if (t == F32 || t == F64) return handler(float_binary<FDiv>(t, ftz, false, rnd));
  return handler(root == "div" ? int_binary<Div>(t) : int_binary<Rem>(t));
}

void Decoder::root_or_reciprocal() {
  const bool ftz = take("ftz"), approx = take("approx");
  const int rnd = take_rounding();
  if (rnd != RN) bad("this rounding");
  const Type t = take_type();
  same(t, 1);
  if (root == "rcp") return handler(approx ? approximate<FRcpApprox>(t, ftz) : float_unary<FRcp>(t, ftz, false));
  return handler(approx ? approximate<FSqrtApprox>(t, ftz) : float_unary<FSqrt>(t, ftz, false));
}

void Decoder::approximation() {
  if (!take("approx")) bad("not approx");
  const bool ftz = take("ftz");
  const Type t = take_type();
  same(t, 1);
  return handler(root == "rsqrt" ? approximate<FRsqrtApprox>(t, ftz)
                 : root == "ex2" ? approximate<FEx2>(t, ftz)
                 : root == "lg2" ? approximate<FLg2>(t, ftz)
                 : root == "sin" ? approximate<FSin>(t, ftz)
                 : root == "cos" ? approximate<FCos>(t, ftz)
                                 : approximate<FTanh>(t, ftz));
}

void Decoder::sign() {
  const bool ftz = take("ftz");
  const Type t = take_type();
  same(t, 1);
  if (t == F32 || t == F64) {  // the bits of a NaN stay what they are
    if (ftz) return handler(root == "abs" ? float_unary<FAbs>(t, true, false) : float_unary<FNeg>(t, true, false));
    if (t == F32) return handler(root == "abs" ? unary<float, float, FAbs> : unary<float, float, FNeg>);
    return handler(root == "abs" ? unary<double, double, FAbs> : unary<double, double, FNeg>);
  }
  return handler(root == "abs" ? int_unary<Abs>(t) : int_unary<Neg>(t));
}

void Decoder::compare_values() {
  i->x = take("ftz");
  const Type t = take_type();
  i->mode = take("and") ? 1 : take("or") ? 2 : take("xor") ? 3 : 0;
  static const std::map<std::string, std::function<Handler(Type)>> table = {
      {"eq", any_compare<Eq>},   {"ne", any_compare<Ne>},   {"lt", any_compare<Lt>},   {"le", any_compare<Le>},
      {"gt", any_compare<Gt>},   {"ge", any_compare<Ge>},   {"lo", any_compare<Lt>},   {"ls", any_compare<Le>},
      {"hi", any_compare<Gt>},   {"hs", any_compare<Ge>},   {"equ", any_compare<Equ>}, {"neu", any_compare<Neu>},
      {"ltu", any_compare<Ltu>}, {"leu", any_compare<Leu>}, {"gtu", any_compare<Gtu>}, {"geu", any_compare<Geu>},
      {"num", any_compare<Num>}, {"nan", any_compare<Nan>}};
  Handler h = nullptr;
  for (const auto& [name, pick] : table)
    if (take(name)) h = pick(t);
  handler(h);
  if (operands()[0].kind == Operand::PAIR) {
    if (operands()[0].parts[0].kind != Operand::SINK)
      i->predicate_out = static_cast<int16_t>(predicate(operands()[0].parts[0]));
    if (operands()[0].parts[1].kind != Operand::SINK)
      i->predicate_out2 = static_cast<int16_t>(predicate(operands()[0].parts[1]));
  } else
    i->predicate_out = static_cast<int16_t>(predicate(operands()[0]));
  source(operands()[1], is_wide(t) ? 8 : 4), source(operands()[2], is_wide(t) ? 8 : 4);
  if (i->mode) {
    count(4);
    i->predicate_in = static_cast<int16_t>(predicate(operands()[3]));
    i->predicate_in_negated = operands()[3].negated;
  } else
    count(3);
  return;
}

void Decoder::convert_value() {
  const bool sat = take("sat"), ftz = take("ftz");
  const bool integral = take("rni")   ? (i->rounding = RN, true)
                        : take("rzi") ? (i->rounding = RZ, true)
                        : take("rmi") ? (i->rounding = RM, true)
                        : take("rpi") ? (i->rounding = RP, true)
                                      : false;
  if (!integral) i->rounding = static_cast<uint8_t>(take_rounding());
  i->ty = take_type();
  if (i->ty == BF16X2) {
    i->ty2 = take_type();
    if (i->ty2 != F32 || i->rounding != RN || sat || ftz || integral) bad("this form of cvt");
    count(3);
    dest(operands()[0], 4), source(operands()[1], 4), source(operands()[2], 4);
    return handler(convert_bf16x2);
  }
  i->ty2 = take_type();
  count(2);
  i->mode = static_cast<uint8_t>(sat | ftz << 1 | integral << 2);
  dest(operands()[0], 0), source(operands()[1], operands()[1].kind == Operand::IMM ? std::max(4, size_of(i->ty2)) : 0);
  const bool plain = i->operands[0].wide == is_wide(i->ty) && i->operands[1].wide == is_wide(i->ty2) && !sat;
  const Handler quick = plain ? quick_convert(i->ty, i->ty2) : nullptr;
  return handler(quick ? quick : convert);
}

}  // namespace ptx
