// decode_bits.cpp: moves, logic, shifts and fields of bits, and the handlers of those that are not arithmetic.
#include <algorithm>

#include "tests/ptx/decoder.h"
#include "tests/ptx/integer_handlers.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

namespace {

void lop3(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t *a = src<uint32_t>(w, i.operands[1]), *b = src<uint32_t>(w, i.operands[2]),
                 *c = src<uint32_t>(w, i.operands[3]);
  alignas(64) uint32_t r[32];
  for (int l = 0; l < 32; ++l) {
    r[l] = 0;
    for (uint32_t k = 0; k < 8; ++k)
      if (i.x >> k & 1) r[l] |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
  }
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot] & w.def[i.operands[3].slot]);
}

void prmt(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t *a = src<uint32_t>(w, i.operands[1]), *b = src<uint32_t>(w, i.operands[2]),
                 *c = src<uint32_t>(w, i.operands[3]);
  alignas(64) uint32_t r[32];
  for (int l = 0; l < 32; ++l) {
    const uint64_t both = a[l] | static_cast<uint64_t>(b[l]) << 32;
    r[l] = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t pick = c[l] >> 4 * k & 15;
      uint32_t byte = static_cast<uint32_t>(both >> 8 * (pick & 7)) & 0xff;
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
      r[l] |= byte << 8 * k;
    }
  }
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot] & w.def[i.operands[3].slot]);
}

template <typename T>
void bfe(Warp& w, Instruction& i, uint32_t m) {
  const T* a = src<T>(w, i.operands[1]);
  const uint32_t *b = src<uint32_t>(w, i.operands[2]), *c = src<uint32_t>(w, i.operands[3]);
  constexpr uint32_t kBits = 8 * sizeof(T);
  alignas(64) T r[32];
  for (int l = 0; l < 32; ++l) {
    const uint32_t pos = b[l] & 255, len = c[l] & 255;
    using U = std::make_unsigned_t<T>;
    const U x = static_cast<U>(a[l]);
    const bool negative = std::is_signed_v<T> && len > 0 && (x >> std::min(pos + len - 1, kBits - 1) & 1);
    U y = 0;
    for (uint32_t k = 0; k < kBits; ++k) {
      const bool bit = k < len && pos + k < kBits ? x >> (pos + k) & 1 : negative;
      y |= static_cast<U>(bit) << k;
    }
    r[l] = static_cast<T>(y);
  }
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot] & w.def[i.operands[3].slot]);
}

template <typename T>
void bfi(Warp& w, Instruction& i, uint32_t m) {
  const T *a = src<T>(w, i.operands[1]), *b = src<T>(w, i.operands[2]);
  const uint32_t *c = src<uint32_t>(w, i.operands[3]), *d = src<uint32_t>(w, i.operands[4]);
  constexpr uint32_t kBits = 8 * sizeof(T);
  alignas(64) T r[32];
  for (int l = 0; l < 32; ++l) {
    const uint32_t pos = c[l] & 255, len = d[l] & 255;
    T y = b[l];
    for (uint32_t k = 0; k < len && pos + k < kBits; ++k)
      y = (y & ~(T{1} << (pos + k))) | ((a[l] >> k & 1) << (pos + k));
    r[l] = y;
  }
  put(w, i.operands[0], r, m,
      w.def[i.operands[1].slot] & w.def[i.operands[2].slot] & w.def[i.operands[3].slot] & w.def[i.operands[4].slot]);
}

// mode: 1 left, 2 clamp.
void funnel(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t *a = src<uint32_t>(w, i.operands[1]), *b = src<uint32_t>(w, i.operands[2]),
                 *c = src<uint32_t>(w, i.operands[3]);
  alignas(64) uint32_t r[32];
  for (int l = 0; l < 32; ++l) {
    const uint32_t n = i.mode & 2 ? std::min(c[l], 32u) : c[l] & 31;
    const uint64_t both = a[l] | static_cast<uint64_t>(b[l]) << 32;
    r[l] = static_cast<uint32_t>(i.mode & 1 ? (both << n) >> 32 : both >> n);
  }
  put(w, i.operands[0], r, m, w.def[i.operands[1].slot] & w.def[i.operands[2].slot] & w.def[i.operands[3].slot]);
}

template <typename L>
void select(Warp& w, Instruction& i, uint32_t m) {
  const L *a = src<L>(w, i.operands[1]), *b = src<L>(w, i.operands[2]);
  uint32_t p = w.pred[i.predicate_in];
  if (i.predicate_in_negated) p = ~p;
  alignas(64) L r[32];
  for (int l = 0; l < 32; ++l) r[l] = p >> l & 1 ? a[l] : b[l];
  const uint32_t da = w.def[i.operands[1].slot], db = w.def[i.operands[2].slot];
  put(w, i.operands[0], r, m, w.pdef[i.predicate_in] & ((p & da) | (~p & db)));
}

// Two halves into one register, and back.
template <typename Half, typename Whole>
void pack(Warp& w, Instruction& i, uint32_t m) {
  alignas(64) Lane<Whole> r[32] = {};
  uint32_t defined = ~0u;
  for (int k = 0; k < i.sources; ++k) {
    const Lane<Half>* const a = src<Lane<Half>>(w, i.operands[1 + k]);
    for (int l = 0; l < 32; ++l)
      r[l] |= static_cast<Whole>(static_cast<Half>(a[l])) << (8 * sizeof(Half) * static_cast<size_t>(k));
    defined &= w.def[i.operands[1 + k].slot];
  }
  put(w, i.operands[0], r, m, defined);
}
template <typename Half, typename Whole>
void unpack(Warp& w, Instruction& i, uint32_t m) {
  Lane<Whole> a[32];
  std::memcpy(a, src<Lane<Whole>>(w, i.operands[i.results]), sizeof a);
  const uint32_t defined = w.def[i.operands[i.results].slot];
  for (int k = 0; k < i.results; ++k) {
    alignas(64) Lane<Half> r[32];
    for (int l = 0; l < 32; ++l) r[l] = static_cast<Half>(a[l] >> (8 * sizeof(Half) * static_cast<size_t>(k)));
    put(w, i.operands[k], r, m, defined);
  }
}

// mode: 0 and, 1 or, 2 xor, 3 not, 4 mov. Operands in ps and imm (with bit 16: negated).
void predicate_op(Warp& w, Instruction& i, uint32_t m) {
  const int q = static_cast<int>(i.imm);
  const uint32_t a = w.pred[i.predicate_in], b = q >= 0 ? w.pred[q] : 0, da = w.pdef[i.predicate_in],
                 db = q >= 0 ? w.pdef[q] : ~0u;
  switch (i.mode) {
    case 0: put_pred(w, i.predicate_out, a & b, m, (da & db) | (da & ~a) | (db & ~b)); break;
    case 1: put_pred(w, i.predicate_out, a | b, m, (da & db) | (da & a) | (db & b)); break;
    case 2: put_pred(w, i.predicate_out, a ^ b, m, da & db); break;
    case 3: put_pred(w, i.predicate_out, ~a, m, da); break;
    default: put_pred(w, i.predicate_out, a, m, da); break;
  }
}
void predicate_constant(Warp& w, Instruction& i, uint32_t m) { put_pred(w, i.predicate_out, i.imm ? ~0u : 0u, m, ~0u); }

template <typename F>
Handler any_shift(Type t) {
  switch (t) {
    case U16:
    case B16: return shift<uint16_t, F>;
    case S16: return shift<int16_t, F>;
    case U32:
    case B32: return shift<uint32_t, F>;
    case S32: return shift<int32_t, F>;
    case U64:
    case B64: return shift<uint64_t, F>;
    case S64: return shift<int64_t, F>;
    default: return nullptr;
  }
}

}  // namespace

void Decoder::move() {
  const Type t = take_type();
  count(2);
  if (t == PRED) {
    i->predicate_out = static_cast<int16_t>(predicate(operands()[0]));
    if (operands()[1].kind == Operand::IMM) {
      i->imm = static_cast<int64_t>(operands()[1].imm);
      i->fn = predicate_constant;
      return;
    }
    i->predicate_in = static_cast<int16_t>(predicate(operands()[1]));
    i->mode = 4, i->imm = -1, i->fn = predicate_op;
    return;
  }
  if (operands()[1].kind == Operand::VEC) {
    const size_t parts = operands()[1].parts.size();
    const int half = size_of(t) / static_cast<int>(parts);
    dest(operands()[0], is_wide(t) ? 8 : 4);
    for (const Operand& part : operands()[1].parts) source(part, half == 8 ? 8 : 4);
    handler(t == B32 && half == 2   ? pack<uint16_t, uint32_t>
            : t == B64 && half == 4 ? pack<uint32_t, uint64_t>
            : t == B64 && half == 2 ? pack<uint16_t, uint64_t>
            : t == B32 && half == 1 ? pack<uint8_t, uint32_t>
                                    : Handler{});
    return;
  }
  if (operands()[0].kind == Operand::VEC) {
    const size_t parts = operands()[0].parts.size();
    const int half = size_of(t) / static_cast<int>(parts);
    for (const Operand& part : operands()[0].parts) dest(part, half == 8 ? 8 : 4);
    source(operands()[1], is_wide(t) ? 8 : 4);
    handler(t == B32 && half == 2   ? unpack<uint16_t, uint32_t>
            : t == B64 && half == 4 ? unpack<uint32_t, uint64_t>
            : t == B64 && half == 2 ? unpack<uint16_t, uint64_t>
            : t == B32 && half == 1 ? unpack<uint8_t, uint32_t>
                                    : Handler{});
    return;
  }
  same(t, 1);
  return handler(is_wide(t) ? unary<uint64_t, uint64_t, Move> : unary<uint32_t, uint32_t, Move>);
}

void Decoder::logic() {
  const Type t = take_type();
  if (t == PRED) {
    i->predicate_out = static_cast<int16_t>(predicate(operands()[0]));
    i->predicate_in = static_cast<int16_t>(predicate(operands()[1]));
    i->imm = root == "not" ? -1 : predicate(operands()[2]);
    if (operands()[1].negated || (operands().size() > 2 && operands()[2].negated)) bad("a negated predicate");
    i->mode = root == "and" ? 0 : root == "or" ? 1 : root == "xor" ? 2 : 3;
    i->fn = predicate_op;
    return;
  }
  same(t, root == "not" ? 1 : 2);
  return handler(root == "and"   ? int_binary<And>(t)
                 : root == "or"  ? int_binary<Or>(t)
                 : root == "xor" ? int_binary<Xor>(t)
                                 : int_unary<Not>(t));
}

void Decoder::logical_not() {
  const Type t = take_type();
  same(t, 1);
  return handler(int_unary<Cnot>(t));
}

void Decoder::shift_bits() {
  const Type t = take_type();
  count(3);
  dest(operands()[0], is_wide(t) ? 8 : 4);
  source(operands()[1], is_wide(t) ? 8 : 4);
  source(operands()[2], 4);
  return handler(root == "shl" ? any_shift<Shl>(t) : any_shift<Shr>(t));
}

void Decoder::count_bits() {
  const Type t = take_type();
  count(2);
  dest(operands()[0], 4);
  source(operands()[1], is_wide(t) ? 8 : 4);
  if (root == "popc") return handler(is_wide(t) ? unary<uint32_t, uint64_t, Popc> : unary<uint32_t, uint32_t, Popc>);
  return handler(is_wide(t) ? unary<uint32_t, uint64_t, Clz> : unary<uint32_t, uint32_t, Clz>);
}

void Decoder::reverse_bits() {
  const Type t = take_type();
  same(t, 1);
  return handler(is_wide(t) ? unary<uint64_t, uint64_t, Brev> : unary<uint32_t, uint32_t, Brev>);
}

void Decoder::extract_field() {
  const Type t = take_type();
  count(4);
  dest(operands()[0], is_wide(t) ? 8 : 4);
  source(operands()[1], is_wide(t) ? 8 : 4);
  source(operands()[2], 4), source(operands()[3], 4);
  return handler(t == U32   ? bfe<uint32_t>
                 : t == S32 ? bfe<int32_t>
                 : t == U64 ? bfe<uint64_t>
                 : t == S64 ? bfe<int64_t>
                            : Handler{});
}

void Decoder::insert_field() {
  const Type t = take_type();
  count(5);
  const int bytes = is_wide(t) ? 8 : 4;
  dest(operands()[0], bytes);
  source(operands()[1], bytes), source(operands()[2], bytes), source(operands()[3], 4), source(operands()[4], 4);
  return handler(t == B32 ? bfi<uint32_t> : t == B64 ? bfi<uint64_t> : Handler{});
}

void Decoder::any_logic() {
  const Type t = take_type();
  count(5);
  if (t != B32 || operands()[4].kind != Operand::IMM) bad("not supported");
  dest(operands()[0], 4);
  for (int k = 1; k < 4; ++k) source(operands()[static_cast<size_t>(k)], 4);
  i->x = static_cast<uint32_t>(operands()[4].imm);
  return handler(lop3);
}

void Decoder::permute_bytes() {
  const Type t = take_type();
  if (t != B32) bad("type");
  same(t, 3);
  return handler(prmt);
}

void Decoder::shift_pair() {
  i->mode = static_cast<uint8_t>((take("l")   ? 1
                                  : take("r") ? 0
                                              : (bad("direction"), 0)) |
                                 (take("clamp")  ? 2
                                  : take("wrap") ? 0
                                                 : (bad("mode"), 0)));
  const Type t = take_type();
  same(t, 3);
  return handler(t == B32 ? funnel : Handler{});
}

void Decoder::select_value() {
  const Type t = take_type();
  count(4);
  dest(operands()[0], is_wide(t) ? 8 : 4);
  source(operands()[1], is_wide(t) ? 8 : 4), source(operands()[2], is_wide(t) ? 8 : 4);
  i->predicate_in = static_cast<int16_t>(predicate(operands()[3]));
  i->predicate_in_negated = operands()[3].negated;
  return handler(is_wide(t) ? select<uint64_t> : select<uint32_t>);
}

}  // namespace ptx
