// decoder.cpp: the table of instructions, their modifiers and operands, and the names that a function declares.
#include "tests/ptx/decoder.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "tests/ptx/operations.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

namespace {

// As in PTX.
std::string text_of(const Operand& o) {
  std::string text = o.negated ? "!" : "";
  char number[32];
  snprintf(number, sizeof number, "%llx", static_cast<unsigned long long>(o.imm));
  switch (o.kind) {
    case Operand::REG:
    case Operand::SYM: return text + o.name;
    case Operand::IMM: return "0x" + std::string(number);
    case Operand::MEM: return "[" + o.name + (o.imm ? "+0x" + std::string(number) : "") + "]";
    case Operand::SINK: return "_";
    case Operand::PAIR: return text_of(o.parts[0]) + "|" + text_of(o.parts[1]);
    case Operand::VEC:
      for (size_t p = 0; p < o.parts.size(); ++p) text += (p ? "," : "{") + text_of(o.parts[p]);
      return text + "}";
  }
  return text;
}

}  // namespace

void Decoder::instruction() {
  static const std::unordered_map<std::string, void (Decoder::*)()> table = {
      {"mov", &Decoder::move},
      {"add", &Decoder::add_or_extreme},
      {"sub", &Decoder::add_or_extreme},
      {"min", &Decoder::add_or_extreme},
      {"max", &Decoder::add_or_extreme},
      {"mul", &Decoder::multiply},
      {"mad", &Decoder::multiply},
      {"fma", &Decoder::multiply},
      {"div", &Decoder::divide},
      {"rem", &Decoder::divide},
      {"rcp", &Decoder::root_or_reciprocal},
      {"sqrt", &Decoder::root_or_reciprocal},
      {"rsqrt", &Decoder::approximation},
      {"ex2", &Decoder::approximation},
      {"lg2", &Decoder::approximation},
      {"sin", &Decoder::approximation},
      {"cos", &Decoder::approximation},
      {"tanh", &Decoder::approximation},
      {"abs", &Decoder::sign},
      {"neg", &Decoder::sign},
      {"and", &Decoder::logic},
      {"or", &Decoder::logic},
      {"xor", &Decoder::logic},
      {"not", &Decoder::logic},
      {"cnot", &Decoder::logical_not},
      {"shl", &Decoder::shift_bits},
      {"shr", &Decoder::shift_bits},
      {"popc", &Decoder::count_bits},
      {"clz", &Decoder::count_bits},
      {"brev", &Decoder::reverse_bits},
      {"bfe", &Decoder::extract_field},
      {"bfi", &Decoder::insert_field},
      {"lop3", &Decoder::any_logic},
      {"prmt", &Decoder::permute_bytes},
      {"shf", &Decoder::shift_pair},
      {"selp", &Decoder::select_value},
      {"setp", &Decoder::compare_values},
      {"cvt", &Decoder::convert_value},
      {"cvta", &Decoder::convert_address},
      {"ld", &Decoder::load_memory},
      {"ldu", &Decoder::load_memory},
      {"st", &Decoder::store_memory},
      {"atom", &Decoder::atomic_operation},
      {"red", &Decoder::atomic_operation},
      {"cp", &Decoder::copy_async},
      {"bra", &Decoder::branch},
      {"ret", &Decoder::return_},
      {"exit", &Decoder::return_},
      {"trap", &Decoder::trap},
      {"brkpt", &Decoder::trap},
      {"bar", &Decoder::barrier},
      {"barrier", &Decoder::barrier},
      {"membar", &Decoder::order_memory},
      {"fence", &Decoder::order_memory},
      {"griddepcontrol", &Decoder::no_operation},
      {"nanosleep", &Decoder::no_operation},
      {"prefetch", &Decoder::no_operation},
      {"prefetchu", &Decoder::no_operation},
      {"shfl", &Decoder::shuffle_lanes},
      {"vote", &Decoder::vote_of_lanes},
      {"redux", &Decoder::reduce_lanes},
      {"match", &Decoder::match_lanes},
      {"activemask", &Decoder::active_lanes},
      {"ldmatrix", &Decoder::load_matrices},
      {"mma", &Decoder::multiply_matrices},
  };
  const auto found = table.find(root);
  if (found == table.end()) bad("unknown instruction");
  (this->*found->second)();
}

void Decoder::run() {
  declare_variables();
  declare_registers();
  f.code.resize(f.body.size() + 1);
  for (size_t k = 0; k < f.body.size(); ++k) {
    s = &f.body[k];
    i = &f.code[k];
    statement();
  }
  s = nullptr;
  f.code.back().kind = RET;
  f.code.back().text = "(end)";
  place_registers();
}

void Decoder::statement() {
  i->file = s->file;
  i->line = s->line;
  i->ptx_line = s->ptx_line;
  i->text = (s->predicate.empty() ? "" : "@" + std::string(s->negated ? "!" : "") + s->predicate + " ") + s->opcode;
  for (size_t o = 0; o < s->operands.size(); ++o) i->text += (o ? ", " : " ") + text_of(s->operands[o]);
  if (!s->predicate.empty()) {
    const auto found = regs.find(s->predicate);
    if (found == regs.end() || found->second.second != PRED) bad("predicate");
    i->guard = static_cast<int16_t>(found->second.first);
    i->guard_negated = s->negated;
  }
  used.assign(s->parts.size(), false);
  root = s->parts[0];
  instruction();
  for (size_t p = 1; p < used.size(); ++p)
    if (!used[p]) bad("unknown modifier ." + s->parts[p]);
}

void Decoder::bad(const std::string& what) {
  fail(m.source + ":" + std::to_string(s ? s->ptx_line : 0) + ": " + what + ": " + (s ? i->text : "") + " (in " +
       f.name + ")");
}

int Decoder::new_virtual(bool wide) {
  virtual_wide.push_back(wide);
  return static_cast<int>(virtual_wide.size()) - 1;
}

// ---- modifiers

bool Decoder::take(const std::string& name) {
  for (size_t k = 1; k < s->parts.size(); ++k) {
    if (!used[k] && s->parts[k] == name) {
      used[k] = true;
      return true;
    }
  }
  return false;
}

Type Decoder::take_type() {
  for (size_t k = 1; k < s->parts.size(); ++k) {
    const Type t = type_of(s->parts[k]);
    if (!used[k] && t != NO_TYPE) {
      used[k] = true;
      return t;
    }
  }
  bad("no type");
}

int Decoder::take_rounding() {
  if (take("rn")) return RN;
  if (take("rz")) return RZ;
  if (take("rm")) return RM;
  if (take("rp")) return RP;
  return RN;
}

Space Decoder::take_space() {
  const bool cta = take("shared::cta");
  if (cta || take("shared")) return SHARED;
  if (take("global")) return GLOBAL;
  if (take("local")) return LOCAL;
  if (take("param")) return PARAM;
  if (take("const")) return CONST;
  return GENERIC;
}

void Decoder::ignore(std::initializer_list<const char*> names) {
  for (const char* n : names)
    while (take(n)) {
    }
}

// ---- operands

Place Decoder::constant(uint64_t bits, bool wide) {
  if (!wide) bits &= 0xffffffffu;
  const auto found = constants.find({bits, wide});
  if (found != constants.end()) return found->second;
  Place o;
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

Place Decoder::special(const std::string& name) {
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
  Place o;
  o.off = static_cast<uint32_t>(at->second);
  return o;
}

uint64_t Decoder::address(const std::string& name) {
  const auto found = variables.find(name);
  if (found == variables.end()) bad("unknown symbol " + name);
  return found->second->offset;
}

Place Decoder::value(const Operand& o, int bytes) {
  switch (o.kind) {
    case Operand::REG: {
      const auto found = regs.find(o.name);
      if (found == regs.end()) {
        if (bytes == 8) bad("a special register of 64 bits");
        return special(o.name);
      }
      if (found->second.second == PRED) bad("a predicate where a value is expected");
      Place r;
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

int Decoder::predicate(const Operand& o) {
  const auto found = regs.find(o.name);
  if (o.kind != Operand::REG || found == regs.end() || found->second.second != PRED) bad("expected a predicate");
  return found->second.first;
}

void Decoder::dest(const Operand& o, int bytes) {
  if (o.kind == Operand::SINK) {
    Place r;
    r.off = static_cast<uint32_t>(new_virtual(bytes == 8));
    r.wide = bytes == 8;
    i->operands[i->results++] = r;
    return;
  }
  if (o.kind != Operand::REG || !regs.count(o.name)) bad("expected a register");
  i->operands[i->results++] = value(o, bytes);
}

void Decoder::source(const Operand& o, int bytes) { i->operands[i->results + i->sources++] = value(o, bytes); }

void Decoder::memory(const Operand& o) {
  if (o.kind != Operand::MEM) bad("expected an address");
  i->imm = static_cast<int64_t>(o.imm);
  if (o.name.empty())
    i->operands[i->results + i->sources++] = constant(0, true);
  else if (regs.count(o.name)) {
    Operand base = o;
    base.kind = Operand::REG;
    i->operands[i->results + i->sources++] = value(base, 0);
  } else
    i->operands[i->results + i->sources++] = constant(address(o.name), true);
}

void Decoder::count(size_t n) {
  if (s->operands.size() != n) bad("expected " + std::to_string(n) + " operands");
}

void Decoder::same(Type t, size_t sources, int dest_bytes) {
  count(sources + 1);
  const int bytes = std::max(2, size_of(t));
  dest(s->operands[0], std::max(4, dest_bytes ? dest_bytes : bytes) == 8 ? 8 : 4);
  for (size_t k = 1; k <= sources; ++k) source(s->operands[k], bytes == 8 ? 8 : 4);
}

void Decoder::handler(Handler h) {
  if (!h) bad("not supported");
  i->fn = h;
}

// ---- declarations

// Their addresses.
void Decoder::declare_variables() {
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
}

void Decoder::declare_registers() {
  for (const auto& [name, type] : f.registers) {
    const auto found = regs.find(name);
    if (found != regs.end()) {
      if (found->second.second == type) continue;  // the same name in another scope
      fail(m.source + ": register " + name + " has two types in " + f.name);
    }
    regs[name] = {type == PRED ? static_cast<int>(f.preds++) : new_virtual(is_wide(type)), type};
  }
}

void decode(Module& module, Function& function) {
  if (function.decoded) return;
  Decoder(module, function).run();
  function.decoded = true;
}

}  // namespace ptx
