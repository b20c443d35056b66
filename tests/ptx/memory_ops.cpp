// memory_ops.cpp: loads, stores, atomic operations, asynchronous copies, matrices from shared memory, fences.
#include "tests/ptx/accesses.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

namespace {

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
        target_of<kSpace>(w, i, l, lane_bits(w, at, l) + static_cast<uint64_t>(i.imm), kSize * kVec, Use::kRead);
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
        target_of<kSpace>(w, i, l, lane_bits(w, at, l) + static_cast<uint64_t>(i.imm), kSize * kVec, Use::kWrite);
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

// atom d, [a], b, c and red [a], b: x: operation.
template <int kSpace>
void atomic(Warp& w, Instruction& i, uint32_t m) {
  const Place& at = i.operands[i.results];
  m = with_address(w, i, at, m);
  alignas(64) uint64_t r[32];
  for (uint32_t rest = m; rest; rest &= rest - 1) {
    const int l = first_lane(rest);
    const Target t =
        target_of<kSpace>(w, i, l, lane_bits(w, at, l) + static_cast<uint64_t>(i.imm), i.element_size, Use::kAtomic);
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
    const uint64_t to = lane_bits(w, i.operands[0], l) + static_cast<uint64_t>(i.imm),
                   from = lane_bits(w, i.operands[1], l) + i.x;
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
      const Target t = target_of<SHARED>(w, i, l, lane_bits(w, at, l) + static_cast<uint64_t>(i.imm), 16, Use::kRead);
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

void memory_fence(Warp& w, Instruction&, uint32_t m) {
  for (uint32_t rest = m; rest; rest &= rest - 1)
    fence(static_cast<uint32_t>(w.index) * 32 + static_cast<uint32_t>(first_lane(rest)));
}

}  // namespace ptx
