// warp_ops.cpp: memory, asynchronous copies, shuffles and votes, tensor cores, conversions.
#include "tests/ptx/warp_ops.h"

#include <algorithm>

#include "tests/ptx/lanes.h"

namespace ptx {

namespace {

uint64_t address_of(const Warp& w, const Place& o, int l) {
  return o.wide ? src<uint64_t>(w, o)[l] : src<uint32_t>(w, o)[l];
}

// Lanes whose address is known; the others are a finding.
uint32_t with_address(Warp& w, Instruction& i, const Place& o, uint32_t m) {
  const uint32_t unknown = m & ~w.def[o.slot];
  if (unknown) report("undefined address", w, i, unknown, "the address was never written");
  return m;
}

const char* conflict_name(Conflict c) {
  return c == WARP ? "race in a warp" : c == BLOCK ? "race in a block" : "race between blocks";
}

[[noreturn]] void fault(const char* what, const Warp& w, const Instruction& i, int lane, uint64_t address) {
  report("fault", w, i, 1u << lane, "%s: address 0x%llx", what, static_cast<unsigned long long>(address));
  throw Fault(what);
}

void check_global(const Warp& w, Instruction& i, int lane, uint64_t address, uint32_t bytes) {
  if (address >= i.lo && address + bytes <= i.hi && i.generation == machine.generation) return;
  const Allocation* const a = machine.find(address);
  if (!a || address + bytes > a->hi) {
    std::string near = "outside every allocation";
    if (a)
      near = "past the end of an allocation of " + std::to_string(a->hi - a->lo) + " bytes";
    else if (const auto it = machine.allocations.upper_bound(address - 4096);
             it != machine.allocations.end() && it->second.hi <= address && address - it->second.hi < 4096)
      near = std::to_string(address - it->second.hi) + " bytes after an allocation of " +
             std::to_string(it->second.hi - it->second.lo);
    fault(("global memory, " + std::to_string(bytes) + " bytes, " + near).c_str(), w, i, lane, address);
  }
  i.lo = a->lo;
  i.hi = a->hi;
  i.generation = machine.generation;
}

void check_shared(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
  if (address < kSharedBase || address + bytes > kSharedBase + machine.shared_bytes)
    fault(("shared memory, " + std::to_string(bytes) + " bytes of " + std::to_string(machine.shared_bytes)).c_str(), w,
          i, lane, address - kSharedBase);
}

void check_alignment(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
  if (address & (bytes - 1)) fault("misaligned", w, i, lane, address);
}

// f(access, bytes of it) for the pieces of four bytes.
template <typename F>
void each_access(Access* first, uint64_t at, uint32_t bytes, F&& f) {
  while (bytes > 0) {
    const uint32_t begin = at & 3, count = std::min<uint32_t>(4 - begin, bytes);
    f(first[at >> 2], ((1u << count) - 1) << begin);
    at += count;
    bytes -= count;
  }
}

void note_global_read(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
  each_access(machine.accesses, machine.shadow_index(address), bytes, [&](Access& a, uint32_t mask) {
    bool written_here = false;
    const Access before = a;
    const Conflict c = global_read(a, w, static_cast<uint32_t>(lane), mask, written_here);
    if (c != NONE)
      report(conflict_name(c), w, i, 1u << lane, "global memory read that thread %u (block serial %u, this %u) writes",
             before.winfo & 1023, before.wblock - machine.first_serial, machine.block.serial - machine.first_serial);
    if (written_here && (i.mode & 2))
      report("ld.global.nc of written data", w, i, 1u << lane, "the kernel itself writes there");
  });
}
void note_global_write(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
  each_access(machine.accesses, machine.shadow_index(address), bytes, [&](Access& a, uint32_t mask) {
    const Access before = a;
    const Conflict c = global_write(a, w, static_cast<uint32_t>(lane), mask);
    if (c != NONE)
      report(conflict_name(c), w, i, 1u << lane,
             "global memory written: last written by thread %u of block %d, read by thread %u of block %d, this is "
             "block %u",
             before.winfo & 1023, static_cast<int>(before.wblock - machine.first_serial), before.rinfo & 1023,
             static_cast<int>(before.rblock - machine.first_serial), machine.block.serial - machine.first_serial);
  });
}
void note_shared(const Warp& w, const Instruction& i, int lane, uint64_t at, uint32_t bytes, bool write) {
  each_access(machine.shared_accesses.data(), at, bytes, [&](Access& a, uint32_t mask) {
    const Access before = a;
    const Conflict c = write ? shared_write(a, w, static_cast<uint32_t>(lane), mask)
                             : shared_read(a, w, static_cast<uint32_t>(lane), mask);
    if (c != NONE)
      report(conflict_name(c), w, i, 1u << lane,
             "shared memory %s at byte %llu: last written by thread %u%s, read by thread %u%s",
             write ? "written" : "read", static_cast<unsigned long long>(at), before.winfo & 1023,
             before.wblock == machine.block.epoch ? "" : " (before a barrier)", before.rinfo & 1023,
             before.rblock == machine.block.epoch ? "" : " (before a barrier)");
  });
}

// Where an access goes: the data, a byte of definedness for each byte.
struct Target {
  uint8_t* data;
  uint8_t* defined;
};

// Atomic accesses race with nothing.
enum class Use { kRead, kWrite, kAtomic };

template <int kSpace>
Target target_of(Warp& w, Instruction& i, int lane, uint64_t address, uint32_t bytes, Use use) {
  if constexpr (kSpace == GENERIC) {
    switch (address >> 56) {
      case kSharedWindow >> 56: return target_of<SHARED>(w, i, lane, address - kSharedWindow, bytes, use);
      case kLocalWindow >> 56: return target_of<LOCAL>(w, i, lane, address - kLocalWindow, bytes, use);
      case kParamWindow >> 56: return target_of<PARAM>(w, i, lane, address - kParamWindow, bytes, use);
      default: return target_of<GLOBAL>(w, i, lane, address, bytes, use);
    }
  } else if constexpr (kSpace == GLOBAL || kSpace == CONST) {
    check_alignment(w, i, lane, address, bytes);
    check_global(w, i, lane, address, bytes);
    if (use == Use::kWrite) note_global_write(w, i, lane, address, bytes);
    if (use == Use::kRead) note_global_read(w, i, lane, address, bytes);
    return {reinterpret_cast<uint8_t*>(address), machine.defined + machine.shadow_index(address)};
  } else if constexpr (kSpace == SHARED) {
    check_alignment(w, i, lane, address, bytes);
    check_shared(w, i, lane, address, bytes);
    const uint64_t at = address - kSharedBase;
    if (use != Use::kAtomic) note_shared(w, i, lane, at, bytes, use == Use::kWrite);
    uint8_t* const defined = machine.shared_defined.data() + at;
    for (uint32_t k = 0; k < bytes; ++k) {
      if (defined[k] == 2) {
        report("asynchronous copy", w, i, 1u << lane,
               "shared memory at byte %llu is %s while a copy to it is under way",
               static_cast<unsigned long long>(at + k), use == Use::kRead ? "read" : "written");
        break;
      }
    }
    return {machine.shared.data() + at, defined};
  } else if constexpr (kSpace == LOCAL) {
    check_alignment(w, i, lane, address, bytes);
    const uint64_t size = w.function->local_bytes;
    if (address + bytes > size) fault("local memory", w, i, lane, address);
    const uint64_t at = static_cast<uint64_t>(lane) * size + address;
    return {w.local + at, w.local_defined + at};
  } else {
    check_alignment(w, i, lane, address, bytes);
    if (use != Use::kRead || address + bytes > machine.param_bytes) fault("parameter", w, i, lane, address);
    static uint8_t ones[64];
    std::memset(ones, 1, sizeof ones);
    return {machine.params + address, ones};
  }
}

// mode: 1 signed, 2 read-only cache.
template <int kSpace, int kSize, int kVec>
void load(Warp& w, Instruction& i, uint32_t m) {
  const Place& at = i.operands[kVec];
  m = with_address(w, i, at, m);
  alignas(64) uint64_t r[kVec][32] = {};
  uint32_t defined[kVec] = {};
  for (uint32_t rest = m; rest; rest &= rest - 1) {
    const int l = first_lane(rest);
    const Target t =
        target_of<kSpace>(w, i, l, address_of(w, at, l) + static_cast<uint64_t>(i.imm), kSize * kVec, Use::kRead);
    for (int v = 0; v < kVec; ++v) {
      uint64_t bits = 0, known = 0;
      std::memcpy(&bits, t.data + v * kSize, kSize);
      std::memcpy(&known, t.defined + v * kSize, kSize);
      if (i.mode & 1) bits = static_cast<uint64_t>(static_cast<int64_t>(bits << (64 - 8 * kSize)) >> (64 - 8 * kSize));
      r[v][l] = bits;
      constexpr uint64_t kOnes = 0x0101010101010101ull >> (64 - 8 * kSize);
      if (known == kOnes) defined[v] |= 1u << l;
    }
  }
  for (int v = 0; v < kVec; ++v) {
    const Place& d = i.operands[v];
    if (d.wide) {
      put(w, d, r[v], m, defined[v]);
    } else {
      alignas(64) uint32_t narrow[32];
      for (int l = 0; l < 32; ++l) narrow[l] = static_cast<uint32_t>(r[v][l]);
      put(w, d, narrow, m, defined[v]);
    }
  }
}

template <int kSpace, int kSize, int kVec>
void store(Warp& w, Instruction& i, uint32_t m) {
  const Place& at = i.operands[0];
  m = with_address(w, i, at, m);
  for (uint32_t rest = m; rest; rest &= rest - 1) {
    const int l = first_lane(rest);
    const Target t =
        target_of<kSpace>(w, i, l, address_of(w, at, l) + static_cast<uint64_t>(i.imm), kSize * kVec, Use::kWrite);
    for (int v = 0; v < kVec; ++v) {
      const Place& o = i.operands[1 + v];
      const uint64_t bits = o.wide ? src<uint64_t>(w, o)[l] : src<uint32_t>(w, o)[l];
      std::memcpy(t.data + v * kSize, &bits, kSize);
      std::memset(t.defined + v * kSize, w.def[o.slot] >> l & 1, kSize);
    }
  }
  if (kSpace == GLOBAL) {
    for (int v = 0; v < kVec; ++v) {
      const uint32_t unknown = m & ~w.def[i.operands[1 + v].slot];
      if (unknown) report("undefined value stored", w, i, unknown, "number %d of %d was never written", v + 1, kVec);
    }
  }
}

#define PTX_PICK(fn)                                          \
  template <int kSpace>                                       \
  Handler pick_##fn(int size, int vec) {                      \
    switch (size * 16 + vec) {                                \
      case 1 * 16 + 1: return fn<kSpace, 1, 1>;               \
      case 1 * 16 + 2: return fn<kSpace, 1, 2>;               \
      case 1 * 16 + 4: return fn<kSpace, 1, 4>;               \
      case 2 * 16 + 1: return fn<kSpace, 2, 1>;               \
      case 2 * 16 + 2: return fn<kSpace, 2, 2>;               \
      case 2 * 16 + 4: return fn<kSpace, 2, 4>;               \
      case 4 * 16 + 1: return fn<kSpace, 4, 1>;               \
      case 4 * 16 + 2: return fn<kSpace, 4, 2>;               \
      case 4 * 16 + 4: return fn<kSpace, 4, 4>;               \
      case 8 * 16 + 1: return fn<kSpace, 8, 1>;               \
      case 8 * 16 + 2: return fn<kSpace, 8, 2>;               \
      default: return nullptr;                                \
    }                                                         \
  }                                                           \
  Handler pick_##fn##_space(Space space, int size, int vec) { \
    switch (space) {                                          \
      case GENERIC: return pick_##fn<GENERIC>(size, vec);     \
      case GLOBAL: return pick_##fn<GLOBAL>(size, vec);       \
      case SHARED: return pick_##fn<SHARED>(size, vec);       \
      case LOCAL: return pick_##fn<LOCAL>(size, vec);         \
      case PARAM: return pick_##fn<PARAM>(size, vec);         \
      case CONST: return pick_##fn<CONST>(size, vec);         \
    }                                                         \
    return nullptr;                                           \
  }
PTX_PICK(load)
PTX_PICK(store)

template <typename T>
T atomic_result(int op, T old, T value, T third) {
  switch (op) {
    case A_ADD: return static_cast<T>(old + value);
    case A_MIN: return std::min(old, value);
    case A_MAX: return std::max(old, value);
    case A_EXCH: return value;
    case A_CAS: return old == value ? third : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case A_AND: return old & value;
      case A_OR: return old | value;
      case A_XOR: return old ^ value;
      case A_INC: return old >= value ? 0 : old + 1;
      case A_DEC: return old == 0 || old > value ? value : old - 1;
      default: break;
    }
  }
  fail("atomic operation on this type");
}

// atom d, [a], b, c and red [a], b: x: operation.
template <int kSpace>
void atomic(Warp& w, Instruction& i, uint32_t m) {
  const Place& at = i.operands[i.results];
  m = with_address(w, i, at, m);
  alignas(64) uint64_t r[32];
  for (uint32_t rest = m; rest; rest &= rest - 1) {
    const int l = first_lane(rest);
    const Target t =
        target_of<kSpace>(w, i, l, address_of(w, at, l) + static_cast<uint64_t>(i.imm), i.element_size, Use::kAtomic);
    if (kSpace == GLOBAL) arrive(reinterpret_cast<uint64_t>(t.data), static_cast<uint32_t>(w.index * 32 + l));
    const auto operand = [&](int k) {
      const Place& o = i.operands[i.results + k];
      return o.wide ? src<uint64_t>(w, o)[l] : src<uint32_t>(w, o)[l];
    };
    uint64_t old = 0, next = 0;
    std::memcpy(&old, t.data, i.element_size);
    const uint64_t b = operand(1), c = i.sources > 2 ? operand(2) : 0;
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      T o, v, z;
      std::memcpy(&o, &old, sizeof(T)), std::memcpy(&v, &b, sizeof(T)), std::memcpy(&z, &c, sizeof(T));
      const T n = atomic_result<T>(static_cast<int>(i.x), o, v, z);
      std::memcpy(&next, &n, sizeof(T));
    };
    switch (i.ty) {
      case U32:
      case B32: run(uint32_t{}); break;
      case S32: run(int32_t{}); break;
      case U64:
      case B64: run(uint64_t{}); break;
      case S64: run(int64_t{}); break;
      case F32: run(float{}); break;
      case F64: run(double{}); break;
      default: fail("atomic on this type: " + i.text);
    }
    std::memcpy(t.data, &next, i.element_size);
    r[l] = old;
  }
  if (i.results == 0) return;
  if (i.operands[0].wide)
    put(w, i.operands[0], r, m, ~0u);
  else {
    uint32_t narrow[32];
    for (int l = 0; l < 32; ++l) narrow[l] = static_cast<uint32_t>(r[l]);
    put(w, i.operands[0], narrow, m, ~0u);
  }
}

void complete(Warp& w, Copy& c) {
  std::memcpy(machine.shared.data() + c.to, c.data, c.size);
  std::memcpy(machine.shared_defined.data() + c.to, c.defined, c.size);
  note_shared(w, *c.inst, static_cast<int>(c.lane), c.to, c.size, true);
}

}  // namespace

Handler load_handler(Space space, int element, int vector) { return pick_load_space(space, element, vector); }
Handler store_handler(Space space, int element, int vector) { return pick_store_space(space, element, vector); }
Handler atomic_handler(Space space) {
  return space == SHARED ? atomic<SHARED> : space == GLOBAL ? atomic<GLOBAL> : atomic<GENERIC>;
}

// ---- asynchronous copies: the bytes arrive when their thread waits for them

void cp_async(Warp& w, Instruction& i, uint32_t m) {
  with_address(w, i, i.operands[0], m);
  const uint32_t size = i.element_size;
  for (uint32_t rest = m; rest; rest &= rest - 1) {
    const int l = first_lane(rest);
    Copy c = {};
    uint32_t count = size;
    if (i.sources > 2) {
      if (!(w.def[i.operands[2].slot] >> l & 1)) report("undefined value used", w, i, 1u << l, "the size of a copy");
      count = src<uint32_t>(w, i.operands[2])[l];
      if (count > size) fault("cp.async reads more than it writes", w, i, l, count);
    }
    const uint64_t to = address_of(w, i.operands[0], l) + static_cast<uint64_t>(i.imm),
                   from = address_of(w, i.operands[1], l) + i.x;
    check_alignment(w, i, l, to, size);
    check_shared(w, i, l, to, size);
    if (count > 0) {
      with_address(w, i, i.operands[1], 1u << l);
      check_alignment(w, i, l, from, size);
      check_global(w, i, l, from, count);
      note_global_read(w, i, l, from, count);
      std::memcpy(c.data, reinterpret_cast<const void*>(from), count);
      std::memcpy(c.defined, machine.defined + machine.shadow_index(from), count);
    }
    std::memset(c.defined + count, 1, size - count);
    c.lane = static_cast<uint32_t>(l);
    c.group = w.committed[l];
    c.to = static_cast<uint32_t>(to - kSharedBase);
    c.size = size;
    c.inst = &i;
    note_shared(w, i, l, c.to, size, true);
    uint8_t* const defined = machine.shared_defined.data() + c.to;
    for (uint32_t k = 0; k < size; ++k) {
      if (defined[k] == 2) {
        report("asynchronous copy", w, i, 1u << l, "to shared memory at byte %u, where another copy is under way",
               c.to + k);
        break;
      }
    }
    std::memset(defined, 2, size);
    std::memset(machine.shared.data() + c.to, 0xff, size);
    w.copies.push_back(c);
  }
}

void cp_async_commit(Warp& w, Instruction&, uint32_t m) {
  for (int l = 0; l < 32; ++l) w.committed[l] += m >> l & 1;
}

// imm: how many groups may be left; -1: none, committed or not.
void cp_async_wait(Warp& w, Instruction& i, uint32_t m) {
  size_t kept = 0;
  for (Copy& c : w.copies) {
    const bool due = (m >> c.lane & 1) &&
                     (i.imm < 0 || static_cast<int64_t>(c.group) < static_cast<int64_t>(w.committed[c.lane]) - i.imm);
    if (due)
      complete(w, c);
    else
      w.copies[kept++] = c;
  }
  w.copies.resize(kept);
}

// ---- warps

namespace {
// Executing threads that the mask does not name.
void check_members(Warp& w, Instruction& i, uint32_t m, uint32_t members) {
  if (m & ~members)
    report("warp-synchronous", w, i, m & ~members, "a thread executes it that is not in the mask %08x", members);
}
}  // namespace

// o: d, a, b, c, mask. mode: 0 up, 1 down, 2 bfly, 3 idx.
void shuffle(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t* const a = src<uint32_t>(w, i.operands[1]);
  const uint32_t* const b = src<uint32_t>(w, i.operands[2]);
  const uint32_t* const c = src<uint32_t>(w, i.operands[3]);
  const uint32_t members = src<uint32_t>(w, i.operands[4])[first_lane(m)];
  check_members(w, i, m, members);
  alignas(64) uint32_t r[32] = {};
  uint32_t defined = 0, valid = 0, outside = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(m >> l & 1)) continue;
    const int bval = static_cast<int>(b[l] & 31), cval = static_cast<int>(c[l] & 31),
              segment = static_cast<int>(c[l] >> 8 & 31);
    const int low = l & segment, high = low | (cval & ~segment);
    int j = 0;
    bool ok = false;
    switch (i.mode) {
      case 0:
        j = l - bval;
        ok = j >= high;
        break;
      case 1:
        j = l + bval;
        ok = j <= high;
        break;
      case 2:
        j = l ^ bval;
        ok = j <= high;
        break;
      default:
        j = low | (bval & ~segment);
        ok = j <= high;
        break;
    }
    if (!ok) j = l;
    r[l] = a[j];
    valid |= static_cast<uint32_t>(ok) << l;
    if (!(m >> j & 1))
      outside |= 1u << l;  // the source does not take part: any value
    else if (w.def[i.operands[1].slot] >> j & 1)
      defined |= 1u << l;
  }
  defined &= w.def[i.operands[2].slot] & w.def[i.operands[3].slot] & ~outside;
  put(w, i.operands[0], r, m, defined);
  if (i.predicate_out2 >= 0) put_pred(w, i.predicate_out2, valid, m, ~0u);
}

// mode: 0 all, 1 any, 2 uni, 3 ballot. ps: the predicate, o[nd]: the mask.
void vote(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[i.results])[first_lane(m)];
  check_members(w, i, m, members);
  uint32_t p = w.pred[i.predicate_in];
  if (i.predicate_in_negated) p = ~p;
  p &= m;
  const uint32_t known = (m & ~w.pdef[i.predicate_in]) ? 0 : ~0u;
  if (i.mode == 3) {
    uint32_t r[32];
    for (uint32_t& x : r) x = p;
    put(w, i.operands[0], r, m, known);
    return;
  }
  const bool all = p == m, any = p != 0;
  const bool result = i.mode == 0 ? all : i.mode == 1 ? any : all || !any;
  put_pred(w, i.predicate_out, result ? ~0u : 0u, m, known);
}

void redux(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[2])[first_lane(m)];
  check_members(w, i, m, members);
  const uint32_t* const a = src<uint32_t>(w, i.operands[1]);
  bool started = false;
  uint32_t total = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(m >> l & 1)) continue;
    total = !started      ? a[l]
            : i.ty == S32 ? static_cast<uint32_t>(atomic_result<int32_t>(
                                static_cast<int>(i.x), static_cast<int32_t>(total), static_cast<int32_t>(a[l]), 0))
                          : atomic_result<uint32_t>(static_cast<int>(i.x), total, a[l], 0);
    started = true;
  }
  uint32_t r[32];
  for (uint32_t& x : r) x = total;
  put(w, i.operands[0], r, m, (m & ~w.def[i.operands[1].slot]) ? 0 : ~0u);
}

void match_any(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[2])[first_lane(m)];
  check_members(w, i, m, members);
  const Place& o = i.operands[1];
  uint32_t r[32] = {};
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 32; ++k)
      if ((m >> k & 1) && address_of(w, o, k) == address_of(w, o, l)) r[l] |= 1u << k;
  put(w, i.operands[0], r, m, (m & ~w.def[o.slot]) ? 0 : ~0u);
}

void active_mask(Warp& w, Instruction& i, uint32_t m) {
  uint32_t r[32];
  for (uint32_t& x : r) x = m;
  put(w, i.operands[0], r, m, ~0u);
}

void memory_fence(Warp& w, Instruction&, uint32_t m) {
  for (uint32_t rest = m; rest; rest &= rest - 1)
    fence(static_cast<uint32_t>(w.index) * 32 + static_cast<uint32_t>(first_lane(rest)));
}

void warp_barrier(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[0])[first_lane(m)];
  check_members(w, i, m, members);
  if ((members & w.alive) == w.alive)
    ++w.sync_epoch;  // fewer order only themselves: not modelled, which can only warn too much
}

// x: number of matrices; mode: 1 transposed.
void ldmatrix(Warp& w, Instruction& i, uint32_t m) {
  const int count = static_cast<int>(i.x);
  const Place& at = i.operands[count];
  with_address(w, i, at, m);
  uint16_t rows[4][8][8];
  uint8_t known[4][8][8];
  for (int k = 0; k < count; ++k) {
    for (int row = 0; row < 8; ++row) {
      const int l = 8 * k + row;
      const Target t = target_of<SHARED>(w, i, l, address_of(w, at, l) + static_cast<uint64_t>(i.imm), 16, Use::kRead);
      std::memcpy(rows[k][row], t.data, 16);
      for (int c = 0; c < 8; ++c) known[k][row][c] = t.defined[2 * c] == 1 && t.defined[2 * c + 1] == 1;
    }
  }
  for (int k = 0; k < count; ++k) {
    alignas(64) uint32_t r[32];
    uint32_t defined = 0;
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4, col = 2 * (l % 4);
      const uint32_t low = i.mode ? rows[k][col][row] : rows[k][row][col];
      const uint32_t high = i.mode ? rows[k][col + 1][row] : rows[k][row][col + 1];
      r[l] = low | high << 16;
      const bool both =
          i.mode ? known[k][col][row] && known[k][col + 1][row] : known[k][row][col] && known[k][row][col + 1];
      defined |= static_cast<uint32_t>(both) << l;
    }
    put(w, i.operands[k], r, m, defined);
  }
}

namespace {
// A sum as tensor cores are known to form it: terms aligned to the largest, cut off below 2^-24 of it, the result cut
// off.
float truncated_sum(const double* terms, int count) {
  int largest = -10000;
  for (int k = 0; k < count; ++k) {
    if (!std::isfinite(terms[k])) {
      double sum = 0;
      for (int j = 0; j < count; ++j) sum += terms[j];
      return static_cast<float>(sum);
    }
    if (terms[k] != 0) largest = std::max(largest, std::ilogb(terms[k]));
  }
  if (largest == -10000) return 0.0f;
  const double unit = std::ldexp(1.0, largest - 24);
  double sum = 0;
  for (int k = 0; k < count; ++k) sum += std::trunc(terms[k] / unit);
  sum *= unit;
  float r = static_cast<float>(sum);
  if (std::fabs(static_cast<double>(r)) > std::fabs(sum)) r = std::nextafterf(r, 0.0f);
  return r;
}
float bf(uint32_t half) { return bits_as<float>(half << 16); }
}  // namespace

// d += a b; o: d 0-3, a 4-7, b 8-9, c 10-13.
void mma_m16n8k16_bf16(Warp& w, Instruction& i, uint32_t m) {
  alignas(64) float a[16][16], b[8][16];  // [row][k], [col][k]
  alignas(64) float d[16][8];
  uint32_t a_unknown = 0, b_unknown = 0;
  for (int r = 0; r < 4; ++r) {
    const uint32_t* const words = src<uint32_t>(w, i.operands[4 + r]);
    const uint32_t known = w.def[i.operands[4 + r].slot];
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4 + (r & 1) * 8, k = 2 * (l % 4) + (r >> 1) * 8;
      a[row][k] = bf(words[l] & 0xffff);
      a[row][k + 1] = bf(words[l] >> 16);
      if (!(known >> l & 1)) a_unknown |= 1u << row;
    }
  }
  for (int r = 0; r < 2; ++r) {
    const uint32_t* const words = src<uint32_t>(w, i.operands[8 + r]);
    const uint32_t known = w.def[i.operands[8 + r].slot];
    for (int l = 0; l < 32; ++l) {
      const int col = l / 4, k = 2 * (l % 4) + r * 8;
      b[col][k] = bf(words[l] & 0xffff);
      b[col][k + 1] = bf(words[l] >> 16);
      if (!(known >> l & 1)) b_unknown |= 1u << col;
    }
  }
  for (int r = 0; r < 4; ++r) {
    const float* const c = src<float>(w, i.operands[10 + r]);
    for (int l = 0; l < 32; ++l) d[l / 4 + (r >> 1) * 8][2 * (l % 4) + (r & 1)] = c[l];
  }
  if (machine.truncate_mma) {
    const int step = machine.architecture >= 90 ? 16 : 8;
    for (int row = 0; row < 16; ++row)
      for (int col = 0; col < 8; ++col)
        for (int k = 0; k < 16; k += step) {
          double terms[17];
          for (int j = 0; j < step; ++j) terms[j] = static_cast<double>(a[row][k + j]) * b[col][k + j];
          terms[step] = d[row][col];
          d[row][col] = truncated_sum(terms, step + 1);
        }
  } else {
    for (int row = 0; row < 16; ++row)
      for (int col = 0; col < 8; ++col) {
        double sum = d[row][col];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[col][k];
        d[row][col] = canonical(static_cast<float>(sum));
      }
  }
  for (int r = 0; r < 4; ++r) {
    alignas(64) float out[32];
    uint32_t defined = w.def[i.operands[10 + r].slot];
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4 + (r >> 1) * 8, col = 2 * (l % 4) + (r & 1);
      out[l] = d[row][col];
      if ((a_unknown >> row & 1) || (b_unknown >> col & 1)) defined &= ~(1u << l);
    }
    put(w, i.operands[r], out, m, defined);
  }
}

// ---- conversions

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
bool is_signed(Type t) { return t == S8 || t == S16 || t == S32 || t == S64; }

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
                 : from == BF16 ? bf(static_cast<uint32_t>(in))
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
