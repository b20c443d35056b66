// accesses.h: where an access to memory goes, after everything that may be wrong with it has been looked for.
#pragma once

#include <algorithm>
#include <string>

#include "tests/ptx/lanes.h"

namespace ptx {

// Lanes whose address is known; the others are a finding.
inline uint32_t with_address(Warp& w, Instruction& i, const Place& o, uint32_t m) {
  const uint32_t unknown = m & ~w.def[o.slot];
  if (unknown) report("undefined address", w, i, unknown, "the address was never written");
  return m;
}

inline const char* conflict_name(Conflict c) {
  return c == WARP ? "race in a warp" : c == BLOCK ? "race in a block" : "race between blocks";
}

[[noreturn]] inline void fault(const char* what, const Warp& w, const Instruction& i, int lane, uint64_t address) {
  report("fault", w, i, 1u << lane, "%s: address 0x%llx", what, static_cast<unsigned long long>(address));
  throw Fault(what);
}

inline void check_global(const Warp& w, Instruction& i, int lane, uint64_t address, uint32_t bytes) {
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

inline void check_shared(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
  if (address < kSharedBase || address + bytes > kSharedBase + machine.shared_bytes)
    fault(("shared memory, " + std::to_string(bytes) + " bytes of " + std::to_string(machine.shared_bytes)).c_str(), w,
          i, lane, address - kSharedBase);
}

inline void check_alignment(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
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

inline void note_global_read(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
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
inline void note_global_write(const Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
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
inline void note_shared(const Warp& w, const Instruction& i, int lane, uint64_t at, uint32_t bytes, bool write) {
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

}  // namespace ptx
