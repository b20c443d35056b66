// decode.cpp: statements to instructions with handlers; then registers get their places in the frame.
#include <algorithm>
#include <functional>

#include "tests/ptx/lanes.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

namespace {

bool is_wide(Ty t) { return size_of(t) == 8; }
bool is_signed(Ty t) { return t == S8 || t == S16 || t == S32 || t == S64; }

// ---- families of handlers by type; nullptr: not for this type

template <typename F>
Handler int_unary(Ty t) {
  switch (t) {
    case U16:
    case B16: return unary<uint16_t, uint16_t, F>;
    case S16: return unary<int16_t, int16_t, F>;
    case U32:
    case B32: return unary<uint32_t, uint32_t, F>;
    case S32: return unary<int32_t, int32_t, F>;
    case U64:
    case B64: return unary<uint64_t, uint64_t, F>;
    case S64: return unary<int64_t, int64_t, F>;
    default: return nullptr;
  }
}
template <typename F>
Handler int_binary(Ty t) {
  switch (t) {
    case U16:
    case B16: return binary<uint16_t, uint16_t, F>;
    case S16: return binary<int16_t, int16_t, F>;
    case U32:
    case B32: return binary<uint32_t, uint32_t, F>;
    case S32: return binary<int32_t, int32_t, F>;
    case U64:
    case B64: return binary<uint64_t, uint64_t, F>;
    case S64: return binary<int64_t, int64_t, F>;
    default: return nullptr;
  }
}
template <typename F>
Handler int_ternary(Ty t) {
  switch (t) {
    case U16: return ternary<uint16_t, uint16_t, uint16_t, F>;
    case S16: return ternary<int16_t, int16_t, int16_t, F>;
    case U32: return ternary<uint32_t, uint32_t, uint32_t, F>;
    case S32: return ternary<int32_t, int32_t, int32_t, F>;
    case U64: return ternary<uint64_t, uint64_t, uint64_t, F>;
    case S64: return ternary<int64_t, int64_t, int64_t, F>;
    default: return nullptr;
  }
}
template <typename F>
Handler any_shift(Ty t) {
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
template <typename F>
Handler any_compare(Ty t) {
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
Handler float_unary(Ty t, bool ftz, bool sat) {
  if (t == F64) return ftz || sat ? nullptr : unary<double, double, Float<F, false>>;
  if (t != F32) return nullptr;
  return ftz   ? sat ? unary<float, float, Float<F, true, true>> : unary<float, float, Float<F, true>>
           : sat ? unary<float, float, Float<F, false, true>>
               : unary<float, float, Float<F, false>>;
}
template <typename F>
Handler approximate(Ty t, bool ftz) {
  return t != F32 ? nullptr : ftz ? unary<float, float, Float<F, true>> : unary<float, float, Float<F, false>>;
}
template <typename F>
Handler float_binary(Ty t, bool ftz, bool sat, int rnd) {
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
Handler fma_handler(Ty t, bool ftz, bool sat, int rnd) {
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

// ---- single handlers

void lop3(Warp& w, Inst& i, uint32_t m) {
  const uint32_t *a = src<uint32_t>(w, i.o[1]), *b = src<uint32_t>(w, i.o[2]), *c = src<uint32_t>(w, i.o[3]);
  alignas(64) uint32_t r[32];
  for (int l = 0; l < 32; ++l) {
    r[l] = 0;
    for (uint32_t k = 0; k < 8; ++k)
      if (i.x >> k & 1) r[l] |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
  }
  put(w, i.o[0], r, m, w.def[i.o[1].slot] & w.def[i.o[2].slot] & w.def[i.o[3].slot]);
}

void prmt(Warp& w, Inst& i, uint32_t m) {
  const uint32_t *a = src<uint32_t>(w, i.o[1]), *b = src<uint32_t>(w, i.o[2]), *c = src<uint32_t>(w, i.o[3]);
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
  put(w, i.o[0], r, m, w.def[i.o[1].slot] & w.def[i.o[2].slot] & w.def[i.o[3].slot]);
}

template <typename T>
void bfe(Warp& w, Inst& i, uint32_t m) {
  const T* a = src<T>(w, i.o[1]);
  const uint32_t *b = src<uint32_t>(w, i.o[2]), *c = src<uint32_t>(w, i.o[3]);
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
  put(w, i.o[0], r, m, w.def[i.o[1].slot] & w.def[i.o[2].slot] & w.def[i.o[3].slot]);
}

template <typename T>
void bfi(Warp& w, Inst& i, uint32_t m) {
  const T *a = src<T>(w, i.o[1]), *b = src<T>(w, i.o[2]);
  const uint32_t *c = src<uint32_t>(w, i.o[3]), *d = src<uint32_t>(w, i.o[4]);
  constexpr uint32_t kBits = 8 * sizeof(T);
  alignas(64) T r[32];
  for (int l = 0; l < 32; ++l) {
    const uint32_t pos = c[l] & 255, len = d[l] & 255;
    T y = b[l];
    for (uint32_t k = 0; k < len && pos + k < kBits; ++k)
      y = (y & ~(T{1} << (pos + k))) | ((a[l] >> k & 1) << (pos + k));
    r[l] = y;
  }
  put(w, i.o[0], r, m, w.def[i.o[1].slot] & w.def[i.o[2].slot] & w.def[i.o[3].slot] & w.def[i.o[4].slot]);
}

// mode: 1 left, 2 clamp.
void funnel(Warp& w, Inst& i, uint32_t m) {
  const uint32_t *a = src<uint32_t>(w, i.o[1]), *b = src<uint32_t>(w, i.o[2]), *c = src<uint32_t>(w, i.o[3]);
  alignas(64) uint32_t r[32];
  for (int l = 0; l < 32; ++l) {
    const uint32_t n = i.mode & 2 ? std::min(c[l], 32u) : c[l] & 31;
    const uint64_t both = a[l] | static_cast<uint64_t>(b[l]) << 32;
    r[l] = static_cast<uint32_t>(i.mode & 1 ? (both << n) >> 32 : both >> n);
  }
  put(w, i.o[0], r, m, w.def[i.o[1].slot] & w.def[i.o[2].slot] & w.def[i.o[3].slot]);
}

template <typename L>
void select(Warp& w, Inst& i, uint32_t m) {
  const L *a = src<L>(w, i.o[1]), *b = src<L>(w, i.o[2]);
  uint32_t p = w.pred[i.ps];
  if (i.psneg) p = ~p;
  alignas(64) L r[32];
  for (int l = 0; l < 32; ++l) r[l] = p >> l & 1 ? a[l] : b[l];
  const uint32_t da = w.def[i.o[1].slot], db = w.def[i.o[2].slot];
  put(w, i.o[0], r, m, w.pdef[i.ps] & ((p & da) | (~p & db)));
}

// Two halves into one register, and back.
template <typename Half, typename Whole>
void pack(Warp& w, Inst& i, uint32_t m) {
  alignas(64) Lane<Whole> r[32] = {};
  uint32_t defined = ~0u;
  for (int k = 0; k < i.ns; ++k) {
    const Lane<Half>* const a = src<Lane<Half>>(w, i.o[1 + k]);
    for (int l = 0; l < 32; ++l)
      r[l] |= static_cast<Whole>(static_cast<Half>(a[l])) << (8 * sizeof(Half) * static_cast<size_t>(k));
    defined &= w.def[i.o[1 + k].slot];
  }
  put(w, i.o[0], r, m, defined);
}
template <typename Half, typename Whole>
void unpack(Warp& w, Inst& i, uint32_t m) {
  Lane<Whole> a[32];
  std::memcpy(a, src<Lane<Whole>>(w, i.o[i.nd]), sizeof a);
  const uint32_t defined = w.def[i.o[i.nd].slot];
  for (int k = 0; k < i.nd; ++k) {
    alignas(64) Lane<Half> r[32];
    for (int l = 0; l < 32; ++l) r[l] = static_cast<Half>(a[l] >> (8 * sizeof(Half) * static_cast<size_t>(k)));
    put(w, i.o[k], r, m, defined);
  }
}

// mode: 0 and, 1 or, 2 xor, 3 not, 4 mov. Operands in ps and imm (with bit 16: negated).
void predicate_op(Warp& w, Inst& i, uint32_t m) {
  const int q = static_cast<int>(i.imm);
  const uint32_t a = w.pred[i.ps], b = q >= 0 ? w.pred[q] : 0, da = w.pdef[i.ps], db = q >= 0 ? w.pdef[q] : ~0u;
  switch (i.mode) {
    case 0: put_pred(w, i.pd, a & b, m, (da & db) | (da & ~a) | (db & ~b)); break;
    case 1: put_pred(w, i.pd, a | b, m, (da & db) | (da & a) | (db & b)); break;
    case 2: put_pred(w, i.pd, a ^ b, m, da & db); break;
    case 3: put_pred(w, i.pd, ~a, m, da); break;
    default: put_pred(w, i.pd, a, m, da); break;
  }
}
void predicate_constant(Warp& w, Inst& i, uint32_t m) { put_pred(w, i.pd, i.imm ? ~0u : 0u, m, ~0u); }

template <typename D, typename S>
struct IntCast {
  static D f(S x) { return static_cast<D>(x); }
};

// The conversions between integers that occur most.
Handler quick_convert(Ty to, Ty from) {
  if (to == S64 && from == S32) return unary<int64_t, int32_t, IntCast<int64_t, int32_t>>;
  if (to == U64 && from == U32) return unary<uint64_t, uint32_t, IntCast<uint64_t, uint32_t>>;
  if (to == U32 && from == U64) return unary<uint32_t, uint64_t, IntCast<uint32_t, uint64_t>>;
  if (to == U32 && from == U16) return unary<uint32_t, uint16_t, IntCast<uint32_t, uint16_t>>;
  if (to == U16 && from == U32) return unary<uint16_t, uint32_t, IntCast<uint16_t, uint32_t>>;
  if (to == U64 && from == U16) return unary<uint64_t, uint16_t, IntCast<uint64_t, uint16_t>>;
  return nullptr;
}

// ---- the decoder

struct Decoder {
  Module& m;
  Function& f;
  std::unordered_map<std::string, std::pair<int, Ty>> regs;  // to virtual number (predicates count apart)
  std::vector<uint8_t> virtual_wide;
  std::unordered_map<std::string, Variable*> variables;
  std::map<std::pair<uint64_t, bool>, Opnd> constants;
  std::unordered_map<std::string, int> special_register;
  const Statement* s = nullptr;
  Inst* i = nullptr;
  std::vector<bool> used;

  Decoder(Module& module, Function& function) : m(module), f(function) {}

  [[noreturn]] void bad(const std::string& what) {
    fail(m.source + ":" + std::to_string(s ? s->ptx_line : 0) + ": " + what + ": " + (s ? i->text : "") + " (in " +
         f.name + ")");
  }

  int new_virtual(bool wide) {
    virtual_wide.push_back(wide);
    return static_cast<int>(virtual_wide.size()) - 1;
  }

  // ---- modifiers
  bool take(const std::string& name) {
    for (size_t k = 1; k < s->part.size(); ++k) {
      if (!used[k] && s->part[k] == name) {
        used[k] = true;
        return true;
      }
    }
    return false;
  }
  Ty take_type() {
    for (size_t k = 1; k < s->part.size(); ++k) {
      const Ty t = type_of(s->part[k]);
      if (!used[k] && t != NOTY) {
        used[k] = true;
        return t;
      }
    }
    bad("no type");
  }
  int take_rounding() {
    if (take("rn")) return RN;
    if (take("rz")) return RZ;
    if (take("rm")) return RM;
    if (take("rp")) return RP;
    return RN;
  }
  Space take_space() {
    const bool cta = take("shared::cta");
    if (cta || take("shared")) return SHARED;
    if (take("global")) return GLOBAL;
    if (take("local")) return LOCAL;
    if (take("param")) return PARAM;
    if (take("const")) return CONST;
    return GENERIC;
  }
  void ignore(std::initializer_list<const char*> names) {
    for (const char* n : names)
      while (take(n)) {
      }
  }

  // ---- operands
  Opnd constant(uint64_t bits, bool wide) {
    if (!wide) bits &= 0xffffffffu;
    const auto found = constants.find({bits, wide});
    if (found != constants.end()) return found->second;
    Opnd o;
    o.base = 1;
    o.wide = wide;
    const size_t align = (f.const_pool.size() + 63) / 64 * 64;
    f.const_pool.resize(align + (wide ? 256 : 128));
    o.off = static_cast<uint32_t>(align);
    for (int l = 0; l < 32; ++l) {
      if (wide)
        std::memcpy(&f.const_pool[align + 8 * static_cast<size_t>(l)], &bits, 8);
      else
        std::memcpy(&f.const_pool[align + 4 * static_cast<size_t>(l)], &bits, 4);
    }
    constants[{bits, wide}] = o;
    return o;
  }
  Opnd special(const std::string& name) {
    static const std::set<std::string> known = {"%tid.x",          "%tid.y",       "%tid.z",
                                                "%ntid.x",         "%ntid.y",      "%ntid.z",
                                                "%ctaid.x",        "%ctaid.y",     "%ctaid.z",
                                                "%nctaid.x",       "%nctaid.y",    "%nctaid.z",
                                                "%laneid",         "%warpid",      "%nwarpid",
                                                "%lanemask_lt",    "%lanemask_le", "%lanemask_gt",
                                                "%lanemask_ge",    "%lanemask_eq", "%dynamic_smem_size",
                                                "%total_smem_size"};
    if (!known.count(name)) bad("unknown register " + name);
    const auto [at, fresh] = special_register.emplace(name, 0);
    if (fresh) at->second = new_virtual(false);
    Opnd o;
    o.off = static_cast<uint32_t>(at->second);
    return o;
  }
  // The address of a variable in its own state space.
  uint64_t address(const std::string& name) {
    const auto found = variables.find(name);
    if (found == variables.end()) bad("unknown symbol " + name);
    return found->second->offset;
  }
  // A register, special register, immediate or symbol. `bytes` (2, 4, 8): what the instruction reads; 0: as the
  // register is.
  Opnd value(const Operand& o, int bytes) {
    switch (o.kind) {
      case Operand::REG: {
        const auto found = regs.find(o.name);
        if (found == regs.end()) {
          if (bytes == 8) bad("a special register of 64 bits");
          return special(o.name);
        }
        if (found->second.second == PRED) bad("a predicate where a value is expected");
        Opnd r;
        r.off = static_cast<uint32_t>(found->second.first);
        r.wide = is_wide(found->second.second);
        if (bytes != 0 && r.wide != (bytes == 8)) bad("the size of register " + o.name + " does not fit");
        return r;
      }
      case Operand::IMM: {
        uint64_t bits = o.imm;
        if (o.is_double && bytes == 4) bad("a double immediate");
        if (o.is_float && bytes == 8)
          bits = bits_as<uint64_t>(static_cast<double>(bits_as<float>(static_cast<uint32_t>(bits))));
        return constant(bits, bytes == 8);
      }
      case Operand::SYM: return constant(address(o.name) + o.imm, bytes == 8);
      default: bad("this operand is not a value");
    }
  }
  int predicate(const Operand& o) {
    const auto found = regs.find(o.name);
    if (o.kind != Operand::REG || found == regs.end() || found->second.second != PRED) bad("expected a predicate");
    return found->second.first;
  }
  void dest(const Operand& o, int bytes) {
    if (o.kind == Operand::SINK) {
      Opnd r;
      r.off = static_cast<uint32_t>(new_virtual(bytes == 8));
      r.wide = bytes == 8;
      i->o[i->nd++] = r;
      return;
    }
    if (o.kind != Operand::REG || !regs.count(o.name)) bad("expected a register");
    i->o[i->nd++] = value(o, bytes);
  }
  void source(const Operand& o, int bytes) { i->o[i->nd + i->ns++] = value(o, bytes); }
  // [register + offset]: the base becomes a source, the rest imm.
  void memory(const Operand& o) {
    if (o.kind != Operand::MEM) bad("expected an address");
    i->imm = static_cast<int64_t>(o.imm);
    if (o.name.empty())
      i->o[i->nd + i->ns++] = constant(0, true);
    else if (regs.count(o.name)) {
      Operand base = o;
      base.kind = Operand::REG;
      i->o[i->nd + i->ns++] = value(base, 0);
    } else
      i->o[i->nd + i->ns++] = constant(address(o.name), true);
  }
  void count(size_t n) {
    if (s->operands.size() != n) bad("expected " + std::to_string(n) + " operands");
  }
  // A destination and the sources, all of one size.
  void same(Ty t, size_t sources, int dest_bytes = 0) {
    count(sources + 1);
    const int bytes = std::max(2, size_of(t));
    dest(s->operands[0], std::max(4, dest_bytes ? dest_bytes : bytes) == 8 ? 8 : 4);
    for (size_t k = 1; k <= sources; ++k) source(s->operands[k], bytes == 8 ? 8 : 4);
  }
  void handler(Handler h) {
    if (!h) bad("not supported");
    i->fn = h;
  }

  void instruction();
  void prepare();
  void run();
  void place_registers();
};

void Decoder::instruction() {
  const std::string& root = s->part[0];
  const auto& ops = s->operands;
  Inst& n = *i;

  if (root == "mov") {
    const Ty t = take_type();
    count(2);
    if (t == PRED) {
      n.pd = static_cast<int16_t>(predicate(ops[0]));
      if (ops[1].kind == Operand::IMM) {
        n.imm = static_cast<int64_t>(ops[1].imm);
        n.fn = predicate_constant;
        return;
      }
      n.ps = static_cast<int16_t>(predicate(ops[1]));
      n.mode = 4, n.imm = -1, n.fn = predicate_op;
      return;
    }
    if (ops[1].kind == Operand::VEC) {
      const size_t parts = ops[1].parts.size();
      const int half = size_of(t) / static_cast<int>(parts);
      dest(ops[0], is_wide(t) ? 8 : 4);
      for (const Operand& part : ops[1].parts) source(part, half == 8 ? 8 : 4);
      handler(t == B32 && half == 2   ? pack<uint16_t, uint32_t>
              : t == B64 && half == 4 ? pack<uint32_t, uint64_t>
              : t == B64 && half == 2 ? pack<uint16_t, uint64_t>
              : t == B32 && half == 1 ? pack<uint8_t, uint32_t>
                                      : Handler{});
      return;
    }
    if (ops[0].kind == Operand::VEC) {
      const size_t parts = ops[0].parts.size();
      const int half = size_of(t) / static_cast<int>(parts);
      for (const Operand& part : ops[0].parts) dest(part, half == 8 ? 8 : 4);
      source(ops[1], is_wide(t) ? 8 : 4);
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

  if (root == "add" || root == "sub" || root == "min" || root == "max") {
    const bool approx_ftz = take("ftz");
    const bool sat = take("sat"), nan = take("NaN");
    const int rnd = take_rounding();
    const Ty t = take_type();
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
  if (root == "mul" || root == "mad" || root == "fma") {
    const bool ftz = take("ftz"), sat = take("sat");
    const bool lo = take("lo"), hi = take("hi"), wide = take("wide");
    const int rnd = take_rounding();
    const Ty t = take_type();
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
      dest(ops[0], bytes);
      source(ops[1], 4), source(ops[2], 4);
      if (sources == 3) source(ops[3], bytes);
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
  if (root == "div" || root == "rem") {
    const bool ftz = take("ftz"), full = take("full"), approx = take("approx");
    const int rnd = take_rounding();
    const Ty t = take_type();
    same(t, 2);
    if (t == F32 && (full || approx)) return handler(float_binary<FDivApprox>(t, ftz, false, RN));
    if (t == F32 || t == F64) return handler(float_binary<FDiv>(t, ftz, false, rnd));
    return handler(root == "div" ? int_binary<Div>(t) : int_binary<Rem>(t));
  }
  if (root == "rcp" || root == "sqrt") {
    const bool ftz = take("ftz"), approx = take("approx");
    const int rnd = take_rounding();
    if (rnd != RN) bad("this rounding");
    const Ty t = take_type();
    same(t, 1);
    if (root == "rcp") return handler(approx ? approximate<FRcpApprox>(t, ftz) : float_unary<FRcp>(t, ftz, false));
    return handler(approx ? approximate<FSqrtApprox>(t, ftz) : float_unary<FSqrt>(t, ftz, false));
  }
  if (root == "rsqrt" || root == "ex2" || root == "lg2" || root == "sin" || root == "cos" || root == "tanh") {
    if (!take("approx")) bad("not approx");
    const bool ftz = take("ftz");
    const Ty t = take_type();
    same(t, 1);
    return handler(root == "rsqrt" ? approximate<FRsqrtApprox>(t, ftz)
                   : root == "ex2" ? approximate<FEx2>(t, ftz)
                   : root == "lg2" ? approximate<FLg2>(t, ftz)
                   : root == "sin" ? approximate<FSin>(t, ftz)
                   : root == "cos" ? approximate<FCos>(t, ftz)
                                   : approximate<FTanh>(t, ftz));
  }
  if (root == "abs" || root == "neg") {
    const bool ftz = take("ftz");
    const Ty t = take_type();
    same(t, 1);
    if (t == F32 || t == F64) {  // the bits of a NaN stay what they are
      if (ftz) return handler(root == "abs" ? float_unary<FAbs>(t, true, false) : float_unary<FNeg>(t, true, false));
      if (t == F32) return handler(root == "abs" ? unary<float, float, FAbs> : unary<float, float, FNeg>);
      return handler(root == "abs" ? unary<double, double, FAbs> : unary<double, double, FNeg>);
    }
    return handler(root == "abs" ? int_unary<Abs>(t) : int_unary<Neg>(t));
  }
  if (root == "and" || root == "or" || root == "xor" || root == "not") {
    const Ty t = take_type();
    if (t == PRED) {
      n.pd = static_cast<int16_t>(predicate(ops[0]));
      n.ps = static_cast<int16_t>(predicate(ops[1]));
      n.imm = root == "not" ? -1 : predicate(ops[2]);
      if (ops[1].negated || (ops.size() > 2 && ops[2].negated)) bad("a negated predicate");
      n.mode = root == "and" ? 0 : root == "or" ? 1 : root == "xor" ? 2 : 3;
      n.fn = predicate_op;
      return;
    }
    same(t, root == "not" ? 1 : 2);
    return handler(root == "and"   ? int_binary<And>(t)
                   : root == "or"  ? int_binary<Or>(t)
                   : root == "xor" ? int_binary<Xor>(t)
                                   : int_unary<Not>(t));
  }
  if (root == "cnot") {
    const Ty t = take_type();
    same(t, 1);
    return handler(int_unary<Cnot>(t));
  }
  if (root == "shl" || root == "shr") {
    const Ty t = take_type();
    count(3);
    dest(ops[0], is_wide(t) ? 8 : 4);
    source(ops[1], is_wide(t) ? 8 : 4);
    source(ops[2], 4);
    return handler(root == "shl" ? any_shift<Shl>(t) : any_shift<Shr>(t));
  }
  if (root == "popc" || root == "clz") {
    const Ty t = take_type();
    count(2);
    dest(ops[0], 4);
    source(ops[1], is_wide(t) ? 8 : 4);
    if (root == "popc") return handler(is_wide(t) ? unary<uint32_t, uint64_t, Popc> : unary<uint32_t, uint32_t, Popc>);
    return handler(is_wide(t) ? unary<uint32_t, uint64_t, Clz> : unary<uint32_t, uint32_t, Clz>);
  }
  if (root == "brev") {
    const Ty t = take_type();
    same(t, 1);
    return handler(is_wide(t) ? unary<uint64_t, uint64_t, Brev> : unary<uint32_t, uint32_t, Brev>);
  }
  if (root == "bfe") {
    const Ty t = take_type();
    count(4);
    dest(ops[0], is_wide(t) ? 8 : 4);
    source(ops[1], is_wide(t) ? 8 : 4);
    source(ops[2], 4), source(ops[3], 4);
    return handler(t == U32   ? bfe<uint32_t>
                   : t == S32 ? bfe<int32_t>
                   : t == U64 ? bfe<uint64_t>
                   : t == S64 ? bfe<int64_t>
                              : Handler{});
  }
  if (root == "bfi") {
    const Ty t = take_type();
    count(5);
    const int bytes = is_wide(t) ? 8 : 4;
    dest(ops[0], bytes);
    source(ops[1], bytes), source(ops[2], bytes), source(ops[3], 4), source(ops[4], 4);
    return handler(t == B32 ? bfi<uint32_t> : t == B64 ? bfi<uint64_t> : Handler{});
  }
  if (root == "lop3") {
    const Ty t = take_type();
    count(5);
    if (t != B32 || ops[4].kind != Operand::IMM) bad("not supported");
    dest(ops[0], 4);
    for (int k = 1; k < 4; ++k) source(ops[static_cast<size_t>(k)], 4);
    n.x = static_cast<uint32_t>(ops[4].imm);
    return handler(lop3);
  }
  if (root == "prmt") {
    const Ty t = take_type();
    if (t != B32) bad("type");
    same(t, 3);
    return handler(prmt);
  }
  if (root == "shf") {
    n.mode = static_cast<uint8_t>((take("l")   ? 1
                                   : take("r") ? 0
                                               : (bad("direction"), 0)) |
                                  (take("clamp")  ? 2
                                   : take("wrap") ? 0
                                                  : (bad("mode"), 0)));
    const Ty t = take_type();
    same(t, 3);
    return handler(t == B32 ? funnel : Handler{});
  }
  if (root == "selp") {
    const Ty t = take_type();
    count(4);
    dest(ops[0], is_wide(t) ? 8 : 4);
    source(ops[1], is_wide(t) ? 8 : 4), source(ops[2], is_wide(t) ? 8 : 4);
    n.ps = static_cast<int16_t>(predicate(ops[3]));
    n.psneg = ops[3].negated;
    return handler(is_wide(t) ? select<uint64_t> : select<uint32_t>);
  }
  if (root == "setp") {
    n.x = take("ftz");
    const Ty t = take_type();
    n.mode = take("and") ? 1 : take("or") ? 2 : take("xor") ? 3 : 0;
    static const std::map<std::string, std::function<Handler(Ty)>> table = {
        {"eq", any_compare<Eq>},   {"ne", any_compare<Ne>},   {"lt", any_compare<Lt>},   {"le", any_compare<Le>},
        {"gt", any_compare<Gt>},   {"ge", any_compare<Ge>},   {"lo", any_compare<Lt>},   {"ls", any_compare<Le>},
        {"hi", any_compare<Gt>},   {"hs", any_compare<Ge>},   {"equ", any_compare<Equ>}, {"neu", any_compare<Neu>},
        {"ltu", any_compare<Ltu>}, {"leu", any_compare<Leu>}, {"gtu", any_compare<Gtu>}, {"geu", any_compare<Geu>},
        {"num", any_compare<Num>}, {"nan", any_compare<Nan>}};
    Handler h = nullptr;
    for (const auto& [name, pick] : table)
      if (take(name)) h = pick(t);
    handler(h);
    if (ops[0].kind == Operand::PAIR) {
      if (ops[0].parts[0].kind != Operand::SINK) n.pd = static_cast<int16_t>(predicate(ops[0].parts[0]));
      if (ops[0].parts[1].kind != Operand::SINK) n.pd2 = static_cast<int16_t>(predicate(ops[0].parts[1]));
    } else
      n.pd = static_cast<int16_t>(predicate(ops[0]));
    source(ops[1], is_wide(t) ? 8 : 4), source(ops[2], is_wide(t) ? 8 : 4);
    if (n.mode) {
      count(4);
      n.ps = static_cast<int16_t>(predicate(ops[3]));
      n.psneg = ops[3].negated;
    } else
      count(3);
    return;
  }
  if (root == "cvt") {
    const bool sat = take("sat"), ftz = take("ftz");
    const bool integral = take("rni")   ? (n.rnd = RN, true)
                          : take("rzi") ? (n.rnd = RZ, true)
                          : take("rmi") ? (n.rnd = RM, true)
                          : take("rpi") ? (n.rnd = RP, true)
                                        : false;
    if (!integral) n.rnd = static_cast<uint8_t>(take_rounding());
    n.ty = take_type();
    if (n.ty == BF16X2) {
      n.ty2 = take_type();
      if (n.ty2 != F32 || n.rnd != RN || sat || ftz || integral) bad("this form of cvt");
      count(3);
      dest(ops[0], 4), source(ops[1], 4), source(ops[2], 4);
      return handler(convert_bf16x2);
    }
    n.ty2 = take_type();
    count(2);
    n.mode = static_cast<uint8_t>(sat | ftz << 1 | integral << 2);
    dest(ops[0], 0), source(ops[1], ops[1].kind == Operand::IMM ? std::max(4, size_of(n.ty2)) : 0);
    const bool plain = n.o[0].wide == is_wide(n.ty) && n.o[1].wide == is_wide(n.ty2) && !sat;
    const Handler quick = plain ? quick_convert(n.ty, n.ty2) : nullptr;
    return handler(quick ? quick : convert);
  }
  if (root == "cvta") {
    const bool to = take("to");
    const Space space = take_space();
    const Ty t = take_type();
    same(t, 1);
    const uint64_t window = space == SHARED  ? kSharedWindow
                            : space == LOCAL ? kLocalWindow
                            : space == PARAM ? kParamWindow
                                             : 0;
    if (!is_wide(t)) bad("32-bit addresses");
    n.o[2] = constant(window, true);
    n.ns = 2;
    return handler(to ? binary<uint64_t, uint64_t, Sub> : binary<uint64_t, uint64_t, Add>);
  }
  if (root == "ld" || root == "ldu") {
    n.space = take_space();
    ignore({"volatile",
            "relaxed",
            "acquire",
            "weak",
            "cta",
            "gpu",
            "sys",
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "L1",
            "L1::evict_last",
            "L1::no_allocate",
            "L1::evict_first",
            "L1::evict_normal",
            "L2::128B",
            "L2::64B",
            "L2::256B",
            "L2::evict_last",
            "L2::evict_first"});
    if (take("nc")) n.mode |= 2;
    const int vec = take("v4") ? 4 : take("v2") ? 2 : 1;
    n.ty = take_type();
    count(2);
    n.esize = static_cast<uint8_t>(size_of(n.ty));
    n.vec = static_cast<uint8_t>(vec);
    if (is_signed(n.ty)) n.mode |= 1;
    if (vec > 1) {
      if (ops[0].kind != Operand::VEC || ops[0].parts.size() != static_cast<size_t>(vec)) bad("vector");
      for (const Operand& part : ops[0].parts) dest(part, part.kind == Operand::SINK ? std::max(4, size_of(n.ty)) : 0);
    } else
      dest(ops[0], 0);
    memory(ops[1]);
    return handler(load_handler(static_cast<Space>(n.space), n.esize, vec));
  }
  if (root == "st") {
    n.space = take_space();
    ignore({"volatile", "relaxed", "release", "weak", "cta", "gpu", "sys", "wb", "cg", "cs", "wt", "L1::no_allocate",
            "L2::evict_first"});
    const int vec = take("v4") ? 4 : take("v2") ? 2 : 1;
    n.ty = take_type();
    count(2);
    n.esize = static_cast<uint8_t>(size_of(n.ty));
    n.vec = static_cast<uint8_t>(vec);
    memory(ops[0]);
    const auto stored = [&](const Operand& o) {
      // A register may be wider than what is stored of it, not narrower.
      source(o, o.kind == Operand::REG ? 0 : std::max(4, size_of(n.ty)));
      if (size_of(n.ty) == 8 && !n.o[n.ns - 1].wide) bad("a narrow register");
    };
    if (vec > 1) {
      if (ops[1].kind != Operand::VEC || ops[1].parts.size() != static_cast<size_t>(vec)) bad("vector");
      for (const Operand& part : ops[1].parts) stored(part);
    } else
      stored(ops[1]);
    return handler(store_handler(static_cast<Space>(n.space), n.esize, vec));
  }
  if (root == "atom" || root == "red") {
    n.space = take_space();
    ignore({"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys"});
    static const std::pair<const char*, Atomic> table[] = {
        {"add", A_ADD}, {"min", A_MIN},   {"max", A_MAX}, {"and", A_AND}, {"or", A_OR},
        {"xor", A_XOR}, {"exch", A_EXCH}, {"cas", A_CAS}, {"inc", A_INC}, {"dec", A_DEC}};
    bool found = false;
    for (const auto& [name, code] : table)
      if (!found && take(name)) {
        n.x = code;
        found = true;
      }
    if (!found) bad("operation");
    n.ty = take_type();
    n.esize = static_cast<uint8_t>(size_of(n.ty));
    size_t k = 0;
    if (root == "atom") dest(ops[k++], n.esize == 8 ? 8 : 4);
    memory(ops[k++]);
    for (; k < ops.size(); ++k) source(ops[k], n.esize == 8 ? 8 : 4);
    return handler(atomic_handler(static_cast<Space>(n.space)));
  }
  if (root == "cp") {
    if (take("async")) {
      if (take("commit_group")) {
        count(0);
        return handler(cp_async_commit);
      }
      if (take("wait_all")) {
        count(0);
        n.imm = -1;
        return handler(cp_async_wait);
      }
      if (take("wait_group")) {
        count(1);
        n.imm = static_cast<int64_t>(ops[0].imm);
        return handler(cp_async_wait);
      }
      const bool cg = take("cg");
      if (!cg && !take("ca")) bad("not supported");
      if (!take("shared") && !take("shared::cta")) bad("not supported");
      if (!take("global")) bad("not supported");
      ignore({"L2::128B", "L2::64B", "L2::256B"});
      if (ops.size() < 3) bad("operands");
      memory(ops[0]);
      const int64_t to = n.imm;
      memory(ops[1]);
      n.x = static_cast<uint32_t>(n.imm);
      n.imm = to;
      n.esize = static_cast<uint8_t>(ops[2].imm);
      if (n.esize != 16 && (cg || (n.esize != 8 && n.esize != 4))) bad("size");
      if (ops.size() > 3) source(ops[3], 4);
      return handler(cp_async);
    }
    bad("not supported");
  }
  if (root == "bra") {
    n.kind = BRA;
    take("uni");
    count(1);
    const auto label = f.labels.find(ops[0].name);
    if (label == f.labels.end()) bad("no such label");
    n.target = label->second;
    return;
  }
  if (root == "ret" || root == "exit") {
    n.kind = RET;
    take("uni");
    return;
  }
  if (root == "trap" || root == "brkpt") {
    n.kind = TRAP;
    return;
  }
  if (root == "bar" || root == "barrier") {
    take("cta");
    if (root == "bar" && take("warp")) {
      if (!take("sync")) bad("not supported");
      n.kind = SYNC_MASK;
      source(ops[0], 4);
      n.members = 0;
      return handler(warp_barrier);
    }
    if (!take("sync")) bad("not supported");
    take("aligned");
    if (ops.size() != 1 || ops[0].kind != Operand::IMM) bad("only whole barriers with a fixed number");
    n.kind = BARRIER;
    n.imm = static_cast<int64_t>(ops[0].imm);
    return;
  }
  if ((root == "membar" || root == "fence") && (take("gl") || take("gpu") || take("sys"))) {
    ignore({"sc", "acq_rel"});
    return handler(memory_fence);
  }
  if (root == "membar" || root == "fence" || root == "griddepcontrol" || root == "nanosleep" || root == "prefetch" ||
      root == "prefetchu") {
    n.kind = NOP;
    for (size_t k = 1; k < used.size(); ++k) used[k] = true;
    return;
  }
  if (root == "shfl") {
    if (!take("sync")) bad("without sync");
    n.kind = SYNC_MASK;
    n.mode = take("up") ? 0 : take("down") ? 1 : take("bfly") ? 2 : take("idx") ? 3 : (bad("mode"), 0);
    if (take_type() != B32) bad("type");
    count(5);
    if (ops[0].kind == Operand::PAIR) {
      dest(ops[0].parts[0], 4);
      if (ops[0].parts[1].kind != Operand::SINK) n.pd2 = static_cast<int16_t>(predicate(ops[0].parts[1]));
    } else
      dest(ops[0], 4);
    for (size_t k = 1; k < 5; ++k) source(ops[k], 4);
    n.members = 4;
    return handler(shuffle);
  }
  if (root == "vote") {
    if (!take("sync")) bad("without sync");
    n.kind = SYNC_MASK;
    n.mode = take("all") ? 0 : take("any") ? 1 : take("uni") ? 2 : take("ballot") ? 3 : (bad("mode"), 0);
    const Ty t = take_type();
    if ((t == PRED) == (n.mode == 3)) bad("type");
    count(3);
    if (n.mode == 3)
      dest(ops[0], 4);
    else
      n.pd = static_cast<int16_t>(predicate(ops[0]));
    n.ps = static_cast<int16_t>(predicate(ops[1]));
    n.psneg = ops[1].negated;
    source(ops[2], 4);
    n.members = n.nd;
    return handler(vote);
  }
  if (root == "redux") {
    if (!take("sync")) bad("without sync");
    n.kind = SYNC_MASK;
    n.x = take("add")   ? A_ADD
          : take("min") ? A_MIN
          : take("max") ? A_MAX
          : take("and") ? A_AND
          : take("or")  ? A_OR
          : take("xor") ? A_XOR
                        : (bad("operation"), 0);
    n.ty = take_type();
    if (size_of(n.ty) != 4 || n.ty == F32) bad("type");
    count(3);
    dest(ops[0], 4), source(ops[1], 4), source(ops[2], 4);
    n.members = 2;
    return handler(redux);
  }
  if (root == "match") {
    if (!take("any") || !take("sync")) bad("not supported");
    n.kind = SYNC_MASK;
    const Ty t = take_type();
    count(3);
    dest(ops[0], 4), source(ops[1], is_wide(t) ? 8 : 4), source(ops[2], 4);
    n.members = 2;
    return handler(match_any);
  }
  if (root == "activemask") {
    take_type();
    count(1);
    dest(ops[0], 4);
    return handler(active_mask);
  }
  if (root == "ldmatrix") {
    if (!take("sync") || !take("aligned") || !take("m8n8")) bad("not supported");
    n.kind = SYNC_ALIGNED;
    n.x = take("x4") ? 4 : take("x2") ? 2 : take("x1") ? 1 : 0;
    n.mode = take("trans");
    if ((!take("shared") && !take("shared::cta")) || take_type() != B16 || n.x == 0) bad("not supported");
    count(2);
    for (const Operand& part : ops[0].parts) dest(part, 4);
    if (n.nd != n.x) bad("registers");
    memory(ops[1]);
    return handler(ldmatrix);
  }
  if (root == "mma") {
    if (s->opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") bad("not supported");
    for (size_t k = 1; k < used.size(); ++k) used[k] = true;
    n.kind = SYNC_ALIGNED;
    count(4);
    const size_t sizes[] = {4, 4, 2, 4};
    for (size_t k = 0; k < 4; ++k) {
      if (ops[k].parts.size() != sizes[k]) bad("registers");
      for (const Operand& part : ops[k].parts) k == 0 ? dest(part, 4) : source(part, 4);
    }
    return handler(mma_m16n8k16_bf16);
  }
  bad("unknown instruction");
}

// Addresses of variables; registers.
void Decoder::prepare() {
  uint64_t local = 0, shared = kSharedBase;
  for (Variable& v : m.globals) {
    if (v.space == SHARED && !v.external)
      v.offset = shared = (shared + v.align - 1) / v.align * v.align, shared += v.size;
    variables[v.name] = &v;
  }
  for (Variable& v : f.locals) {
    uint64_t& top = v.space == SHARED ? shared : local;
    top = (top + v.align - 1) / v.align * v.align;
    v.offset = top;
    top += v.size;
    variables[v.name] = &v;
  }
  for (Variable& v : m.globals) {
    if (v.space != SHARED || !v.external) continue;
    shared = (shared + v.align - 1) / v.align * v.align;
    v.offset = shared;
  }
  f.local_bytes = (local + 15) / 16 * 16;
  f.static_shared = shared - kSharedBase;
  for (Variable& v : f.params) variables[v.name] = &v;
  for (const auto& [name, type] : f.registers) {
    const auto found = regs.find(name);
    if (found != regs.end()) {
      if (found->second.second == type) continue;  // the same name in another scope
      fail(m.source + ": register " + name + " has two types in " + f.name);
    }
    regs[name] = {type == PRED ? static_cast<int>(f.preds++) : new_virtual(is_wide(type)), type};
  }
}

void Decoder::run() {
  prepare();
  f.code.resize(f.body.size() + 1);
  for (size_t k = 0; k < f.body.size(); ++k) {
    s = &f.body[k];
    i = &f.code[k];
    i->file = s->file;
    i->line = s->line;
    i->ptx_line = s->ptx_line;
    i->text = (s->predicate.empty() ? "" : "@" + std::string(s->negated ? "!" : "") + s->predicate + " ") + s->opcode;
    const std::function<std::string(const Operand&)> show = [&](const Operand& o) -> std::string {
      std::string text = o.negated ? "!" : "";
      char number[32];
      snprintf(number, sizeof number, "%llx", static_cast<unsigned long long>(o.imm));
      switch (o.kind) {
        case Operand::REG:
        case Operand::SYM: return text + o.name;
        case Operand::IMM: return "0x" + std::string(number);
        case Operand::MEM: return "[" + o.name + (o.imm ? "+0x" + std::string(number) : "") + "]";
        case Operand::SINK: return "_";
        case Operand::PAIR: return show(o.parts[0]) + "|" + show(o.parts[1]);
        case Operand::VEC:
          for (size_t p = 0; p < o.parts.size(); ++p) text += (p ? "," : "{") + show(o.parts[p]);
          return text + "}";
      }
      return text;
    };
    for (size_t o = 0; o < s->operands.size(); ++o) i->text += (o ? ", " : " ") + show(s->operands[o]);
    if (!s->predicate.empty()) {
      const auto found = regs.find(s->predicate);
      if (found == regs.end() || found->second.second != PRED) bad("predicate");
      i->pred = static_cast<int16_t>(found->second.first);
      i->pneg = s->negated;
    }
    used.assign(s->part.size(), false);
    instruction();
    for (size_t p = 1; p < used.size(); ++p)
      if (!used[p]) bad("unknown modifier ." + s->part[p]);
  }
  s = nullptr;
  f.code.back().kind = RET;
  f.code.back().text = "(end)";
  place_registers();
}

// Virtual registers to places in the frame: those whose lives (from the first to the last instruction at which they
// hold something) do not overlap share one. What may be read before it is written lives from the entry on, so that its
// definedness is nobody else's.
void Decoder::place_registers() {
  const int n = static_cast<int>(f.code.size());
  const size_t count = virtual_wide.size(), words = (count + 63) / 64;
  std::vector<int> begin(count, n), end(count, -1);
  const auto extend = [&](size_t v, int at) {
    begin[v] = std::min(begin[v], at);
    end[v] = std::max(end[v], at);
  };
  // Basic blocks.
  std::vector<int> block_of(static_cast<size_t>(n), 0), first, last;
  std::vector<bool> leader(static_cast<size_t>(n) + 1, false);
  leader[0] = true;
  for (int k = 0; k < n; ++k) {
    const Inst& x = f.code[static_cast<size_t>(k)];
    if (x.kind == BRA) leader[static_cast<size_t>(x.target)] = true;
    if (x.kind == BRA || x.kind == RET) leader[static_cast<size_t>(k) + 1] = true;
  }
  for (int k = 0; k < n; ++k) {
    if (leader[static_cast<size_t>(k)]) first.push_back(k), last.push_back(k);
    last.back() = k;
    block_of[static_cast<size_t>(k)] = static_cast<int>(first.size()) - 1;
  }
  const size_t blocks = first.size();
  std::vector<std::vector<uint64_t>> gen(blocks, std::vector<uint64_t>(words)), kill = gen, in = gen, out = gen;
  const auto each = [&](Inst& x, auto&& def, auto&& use) {
    for (int k = 0; k < x.nd; ++k)
      if (x.o[k].base == 0) def(x.o[k].off);
    for (int k = x.nd; k < x.nd + x.ns; ++k)
      if (x.o[k].base == 0) use(x.o[k].off);
  };
  for (size_t b = 0; b < blocks; ++b) {
    for (int k = first[b]; k <= last[b]; ++k) {
      Inst& x = f.code[static_cast<size_t>(k)];
      each(
          x, [](uint32_t) {},
          [&](uint32_t v) {
            if (!(kill[b][v / 64] >> v % 64 & 1)) gen[b][v / 64] |= 1ull << v % 64;
          });
      each(
          x,
          [&](uint32_t v) {
            if (x.pred < 0) kill[b][v / 64] |= 1ull << v % 64;
          },
          [](uint32_t) {});
      each(
          x, [&](uint32_t v) { extend(v, k); }, [&](uint32_t v) { extend(v, k); });
    }
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks; b-- > 0;) {
      const Inst& x = f.code[static_cast<size_t>(last[b])];
      const auto join = [&](int at) {
        if (at >= n) return;
        const auto& from = in[static_cast<size_t>(block_of[static_cast<size_t>(at)])];
        for (size_t q = 0; q < words; ++q) out[b][q] |= from[q];
      };
      if (x.kind == BRA) join(x.target);
      if (!((x.kind == BRA || x.kind == RET) && x.pred < 0)) join(last[b] + 1);
      for (size_t q = 0; q < words; ++q) {
        const uint64_t now = gen[b][q] | (out[b][q] & ~kill[b][q]);
        if (now != in[b][q]) in[b][q] = now, changed = true;
      }
    }
  }
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t v = 0; v < count; ++v) {
      if (in[b][v / 64] >> v % 64 & 1) extend(v, first[b]);
      if (out[b][v / 64] >> v % 64 & 1) extend(v, last[b]);
    }
  }
  for (const auto& [name, v] : special_register) extend(static_cast<size_t>(v), 0);
  std::vector<size_t> order;
  for (size_t v = 0; v < count; ++v)
    if (end[v] >= 0) order.push_back(v);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return begin[a] < begin[b]; });
  std::vector<Opnd> home(count);
  struct Slot {
    Opnd o;
    int busy_until;
  };
  std::vector<Slot> slots[2];
  uint32_t frame = 0;
  for (const size_t v : order) {
    auto& pool = slots[virtual_wide[v]];
    Slot* found = nullptr;
    for (Slot& slot : pool)
      if (slot.busy_until < begin[v]) {
        found = &slot;
        break;
      }
    if (!found) {
      Opnd o;
      o.off = frame;
      o.wide = virtual_wide[v];
      o.slot = static_cast<uint16_t>(f.slots++);
      frame += virtual_wide[v] ? 256 : 128;
      pool.push_back({o, -1});
      found = &pool.back();
    }
    found->busy_until = end[v];
    home[v] = found->o;
  }
  f.frame_bytes = std::max(frame, 256u);
  f.virtual_registers = static_cast<uint32_t>(order.size());
  for (Inst& x : f.code) {
    for (int k = 0; k < x.nd + x.ns; ++k)
      if (x.o[k].base == 0) x.o[k] = home[x.o[k].off];
  }
  for (const auto& [name, v] : special_register) f.specials.push_back({name, home[static_cast<size_t>(v)]});
}

}  // namespace

void decode(Module& module, Function& function) {
  if (function.decoded) return;
  Decoder(module, function).run();
  function.decoded = true;
}

}  // namespace ptx
