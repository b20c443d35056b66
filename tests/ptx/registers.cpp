// registers.cpp: where a function's registers are. PTX has a new one for nearly every result; few hold something at the
// same time.
#include <algorithm>

#include "tests/ptx/decoder.h"

namespace ptx {

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
    const Instruction& x = f.code[static_cast<size_t>(k)];
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
  const auto each = [&](Instruction& x, auto&& def, auto&& use) {
    for (int k = 0; k < x.results; ++k)
      if (x.operands[k].base == 0) def(x.operands[k].off);
    for (int k = x.results; k < x.results + x.sources; ++k)
      if (x.operands[k].base == 0) use(x.operands[k].off);
  };
  for (size_t b = 0; b < blocks; ++b) {
    for (int k = first[b]; k <= last[b]; ++k) {
      Instruction& x = f.code[static_cast<size_t>(k)];
      each(
          x, [](uint32_t) {},
          [&](uint32_t v) {
            if (!(kill[b][v / 64] >> v % 64 & 1)) gen[b][v / 64] |= 1ull << v % 64;
          });
      each(
          x,
          [&](uint32_t v) {
            if (x.guard < 0) kill[b][v / 64] |= 1ull << v % 64;
          },
          [](uint32_t) {});
      each(
          x, [&](uint32_t v) { extend(v, k); }, [&](uint32_t v) { extend(v, k); });
    }
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks; b-- > 0;) {
      const Instruction& x = f.code[static_cast<size_t>(last[b])];
      const auto join = [&](int at) {
        if (at >= n) return;
        const auto& from = in[static_cast<size_t>(block_of[static_cast<size_t>(at)])];
        for (size_t q = 0; q < words; ++q) out[b][q] |= from[q];
      };
      if (x.kind == BRA) join(x.target);
      if (!((x.kind == BRA || x.kind == RET) && x.guard < 0)) join(last[b] + 1);
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
  std::vector<Place> home(count);
  struct Slot {
    Place o;
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
      Place o;
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
  for (Instruction& x : f.code) {
    for (int k = 0; k < x.results + x.sources; ++k)
      if (x.operands[k].base == 0) x.operands[k] = home[x.operands[k].off];
  }
  for (const auto& [name, v] : special_register) f.specials.push_back({name, home[static_cast<size_t>(v)]});
}

}  // namespace ptx
