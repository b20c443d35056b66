// execute.cpp: a grid, block by block; in a block, warp by warp; in a warp, groups of threads that are at the same
// instruction. Threads of a warp need not stay together: groups run one at a time until they must wait for others
// (warp-synchronous instructions, barriers) or meet them. The order is fixed with seed 0 (the group that is furthest
// back runs, warps run until they wait), random with any other.
#include <algorithm>
#include <cstdio>

#include "tests/ptx/lanes.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

namespace {

constexpr int kNever = 1 << 30;

struct Runner {
  Function& f;
  std::vector<Warp> warps;
  std::vector<std::vector<uint8_t>> frames;
  std::vector<std::vector<uint32_t>> definedness;
  std::vector<std::vector<uint8_t>> locals;
  uint8_t* constants;
  std::vector<uint8_t> constant_copy;

  explicit Runner(Function& function) : f(function) {
    const uint32_t threads = machine.dim[0] * machine.dim[1] * machine.dim[2];
    const size_t count = (threads + 31) / 32;
    warps.resize(count);
    frames.resize(count);
    definedness.resize(count);
    locals.resize(count);
    constant_copy.resize(f.const_pool.size() + 64);
    constants = constant_copy.data();
    while (reinterpret_cast<uintptr_t>(constants) % 64) ++constants;
    std::memcpy(constants, f.const_pool.data(), f.const_pool.size());
    for (size_t k = 0; k < count; ++k) {
      Warp& w = warps[k];
      frames[k].resize(f.frame_bytes + 64);
      definedness[k].resize(f.slots + 2 * f.preds + 2);
      locals[k].resize(64 * f.local_bytes);
      w.base[0] = frames[k].data();
      while (reinterpret_cast<uintptr_t>(w.base[0]) % 64) ++w.base[0];
      w.base[1] = constants;
      w.def = definedness[k].data();
      w.pred = w.def + f.slots;
      w.pdef = w.pred + f.preds;
      w.function = &f;
      w.index = static_cast<int>(k);
      w.local = locals[k].data();
      w.local_defined = w.local + 32 * f.local_bytes;
      const uint32_t rest = threads - static_cast<uint32_t>(k) * 32;
      w.full = rest >= 32 ? ~0u : (1u << rest) - 1;
    }
  }

  void start(Warp& w) {
    std::fill(definedness[static_cast<size_t>(w.index)].begin(), definedness[static_cast<size_t>(w.index)].end(), 0u);
    w.def[0] = ~0u;
    std::memset(w.local_defined, 0, 32 * f.local_bytes);
    std::memset(w.local, 0xff, 32 * f.local_bytes);
    w.groups.assign(1, {0, w.full, false});
    w.alive = w.full;
    w.at_barrier = false;
    w.sync_epoch = w.converge_epoch = 0;
    w.copies.clear();
    std::fill(w.committed, w.committed + 32, 0u);
    for (const auto& [name, o] : f.specials) {
      uint32_t r[32];
      for (uint32_t l = 0; l < 32; ++l) {
        const uint32_t t = static_cast<uint32_t>(w.index) * 32 + l;
        const uint32_t xyz[3] = {t % machine.dim[0], t / machine.dim[0] % machine.dim[1],
                                 t / machine.dim[0] / machine.dim[1]};
        const size_t axis = static_cast<size_t>(name.back() - 'x');
        if (name.compare(0, 5, "%tid.") == 0)
          r[l] = xyz[axis];
        else if (name.compare(0, 6, "%ntid.") == 0)
          r[l] = machine.dim[axis];
        else if (name.compare(0, 7, "%ctaid.") == 0)
          r[l] = machine.block.ctaid[axis];
        else if (name.compare(0, 8, "%nctaid.") == 0)
          r[l] = machine.grid[axis];
        else if (name == "%laneid")
          r[l] = l;
        else if (name == "%warpid")
          r[l] = static_cast<uint32_t>(w.index);
        else if (name == "%nwarpid")
          r[l] = static_cast<uint32_t>(warps.size());
        else if (name == "%lanemask_eq")
          r[l] = 1u << l;
        else if (name == "%lanemask_lt")
          r[l] = (1u << l) - 1;
        else if (name == "%lanemask_le")
          r[l] = (2u << l) - 1;
        else if (name == "%lanemask_gt")
          r[l] = ~((2u << l) - 1);
        else if (name == "%lanemask_ge")
          r[l] = ~((1u << l) - 1);
        else if (name == "%dynamic_smem_size")
          r[l] = machine.shared_bytes - static_cast<uint32_t>(f.static_shared);
        else
          r[l] = machine.shared_bytes;
      }
      put(w, o, r, ~0u, ~0u);
    }
  }

  // ---- groups

  void merge(Warp& w) {
    for (size_t a = 0; a < w.groups.size(); ++a) {
      for (size_t b = w.groups.size(); b-- > a + 1;) {
        if (w.groups[a].pc != w.groups[b].pc) continue;
        w.groups[a].mask |= w.groups[b].mask;
        w.groups[a].wait = false;
        w.groups.erase(w.groups.begin() + static_cast<int64_t>(b));
      }
    }
  }

  std::string describe(const Warp& w) {
    std::string text;
    for (const Group& g : w.groups) {
      char line[64];
      snprintf(line, sizeof line, "\n    threads %08x wait", g.mask);
      text += line + where(f.code[static_cast<size_t>(g.pc)]);
    }
    return text;
  }

  // Until it waits at a barrier or is done, or for at most `budget` instructions.
  void run(Warp& w, int64_t budget) {
    const bool random = machine.seed != 0;
    while (!w.groups.empty() && budget > 0) {
      if (w.groups.size() > 1) merge(w);
      size_t chosen = w.groups.size();
      size_t runnable = 0;
      for (size_t k = 0; k < w.groups.size(); ++k) {
        if (w.groups[k].wait) continue;
        ++runnable;
        if (random ? machine.random() % runnable == 0
                   : chosen == w.groups.size() || w.groups[k].pc < w.groups[chosen].pc)
          chosen = k;
      }
      if (chosen == w.groups.size()) {
        report("deadlock", w, f.code[static_cast<size_t>(w.groups[0].pc)], w.groups[0].mask,
               "threads of a warp wait for each other at different instructions:%s\n ", describe(w).c_str());
        throw Fault("deadlock in a warp");
      }
      int limit = kNever;
      int64_t quantum = budget;
      if (w.groups.size() > 1) {
        if (random)
          quantum = std::min<int64_t>(budget, 1 + machine.random() % 64);
        else
          for (size_t k = 0; k < w.groups.size(); ++k)
            if (k != chosen && w.groups[k].pc > w.groups[chosen].pc) limit = std::min(limit, w.groups[k].pc);
      }
      budget -= run_group(w, chosen, limit, quantum);
      if (w.at_barrier) return;
    }
  }

  // Returns how many instructions it ran.
  int64_t run_group(Warp& w, size_t which, int limit, int64_t quantum) {
    int64_t ran = 0;
    Group g = w.groups[which];
    const auto leave = [&] {
      w.groups[which] = g;
      return ran;
    };
    for (; ran < quantum; ++ran) {
      if (g.pc >= limit) return leave();
      Instruction& i = f.code[static_cast<size_t>(g.pc)];
      uint32_t m = g.mask;
      if (i.guard >= 0) {
        const uint32_t unknown = m & ~w.pdef[i.guard];
        if (unknown)
          report(i.kind == BRA ? "undefined branch" : "undefined predicate", w, i, unknown,
                 "decided by what was never written");
        const uint32_t p = w.pred[i.guard];
        m &= i.guard_negated ? ~p : p;
      }
      ++i.executed;
      i.lanes += static_cast<uint32_t>(__builtin_popcount(m));
      switch (i.kind) {
        case ALU:
          if (m) i.fn(w, i, m);
          ++g.pc;
          break;
        case NOP: ++g.pc; break;
        case TRAP:
          if (m) {
            report("fault", w, i, m, "trap");
            throw Fault("trap");
          }
          ++g.pc;
          break;
        case BRA:
          if (m == g.mask) {
            g.pc = i.target;
          } else if (m == 0) {
            ++g.pc;
          } else {
            const Group taken = {i.target, m, false};
            g.mask &= ~m;
            ++g.pc;
            leave();
            w.groups.push_back(taken);
            return ++ran;
          }
          break;
        case RET:
          w.alive &= ~m;
          g.mask &= ~m;
          ++g.pc;
          if (g.mask == 0) {
            w.groups.erase(w.groups.begin() + static_cast<int64_t>(which));
            for (Group& other : w.groups) other.wait = false;  // they may have waited for these
            return ++ran;
          }
          break;
        default: {
          if (m != g.mask) {  // the others pass by
            const Group rest = {g.pc + 1, g.mask & ~m, false};
            g.mask = m;
            if (m == 0) {
              g = rest;
              break;
            }
            leave();
            w.groups.push_back(rest);
            return ++ran;
          }
          uint32_t need = w.alive;
          if (i.kind == SYNC_MASK) {
            const Place& o = i.operands[i.members];
            if (m & ~w.def[o.slot])
              report("undefined value used", w, i, m, "as the mask of a warp-synchronous instruction");
            need &= src<uint32_t>(w, o)[first_lane(m)];
          }
          if (need & ~m) {
            g.wait = true;
            return leave(), ++ran;
          }
          if (i.kind == BARRIER) {
            w.at_barrier = true;
            w.barrier = &i;
            return leave(), ++ran;
          }
          if (i.kind == SYNC_ALIGNED && m != ~0u)
            report("warp-synchronous", w, i, m, "an instruction for whole warps, executed by threads %08x only", m);
          i.fn(w, i, m);
          if (m == w.alive) ++w.converge_epoch;
          ++g.pc;
          // Waiting groups that the mask does not concern stay; time to look at them again.
          if (w.groups.size() > 1) return leave(), ++ran;
        }
      }
    }
    return leave();
  }

  void run_block() {
    machine.block.first_epoch = machine.block.epoch = machine.next_epoch++;
    const size_t threads = warps.size() * 32;
    machine.block.fences.assign(threads, 0);
    machine.block.fences_at_barrier.assign(threads, 0);
    machine.block.fence_epoch.assign(threads, 0);
    machine.block.arrivals.clear();
    std::memset(machine.shared.data(), 0xff, machine.shared_bytes);
    std::memset(machine.shared_defined.data(), 0, machine.shared_bytes);
    for (Warp& w : warps) start(w);
    std::vector<size_t> order(warps.size());
    for (size_t k = 0; k < order.size(); ++k) order[k] = k;
    while (true) {
      size_t finished = 0, waiting = 0;
      if (machine.seed)
        for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[machine.random() % k]);
      for (const size_t k : order) {
        Warp& w = warps[k];
        if (!w.groups.empty() && !w.at_barrier) run(w, machine.seed ? 1 + machine.random() % 200 : int64_t{1} << 60);
        finished += w.groups.empty();
        waiting += w.at_barrier;
      }
      if (finished == warps.size()) break;
      if (finished + waiting < warps.size()) continue;
      const Instruction* first = nullptr;
      for (Warp& w : warps) {
        if (!w.at_barrier) continue;
        if (first && first->imm != w.barrier->imm) {
          report("barrier", w, *w.barrier, w.alive, "warps wait at different barriers");
          throw Fault("warps at different barriers");
        }
        first = w.barrier;
        w.at_barrier = false;
        ++w.groups[0].pc;
        w.groups[0].wait = false;
      }
      pass_barrier();
    }
    for (const Warp& w : warps) {
      if (!w.copies.empty())
        report("asynchronous copy", w, *w.copies[0].inst, 1, "never waited for (the block has ended)");
    }
  }
};

}  // namespace

void Machine::launch(Module& mod, Function& f, const uint32_t g[3], const uint32_t d[3], uint64_t dynamic_shared,
                     void** arguments) {
  decode(mod, f);
  function = &f;
  module = &mod;
  std::copy(g, g + 3, grid);
  std::copy(d, d + 3, dim);
  std::vector<uint8_t> buffer(f.param_bytes + 16);
  for (size_t k = 0; k < f.params.size(); ++k) std::memcpy(&buffer[f.params[k].offset], arguments[k], f.params[k].size);
  params = buffer.data();
  param_bytes = f.param_bytes;
  shared_bytes = static_cast<uint32_t>(f.static_shared + dynamic_shared);
  if (shared.size() < shared_bytes + 64) {
    shared.resize(shared_bytes + 64);
    shared_defined.resize(shared_bytes + 64);
    shared_accesses.assign(shared_bytes / 4 + 17, Access{});
  }
  ++launches;
  ++f.launches;
  first_serial = next_serial;
  published.clear();
  arrived.clear();
  Runner runner(f);
  const uint64_t count = static_cast<uint64_t>(g[0]) * g[1] * g[2];
  for (uint64_t k = 0; k < count; ++k) {
    const uint64_t b = seed % 2 ? count - 1 - k : k;
    block.ctaid[0] = static_cast<uint32_t>(b % g[0]);
    block.ctaid[1] = static_cast<uint32_t>(b / g[0] % g[1]);
    block.ctaid[2] = static_cast<uint32_t>(b / g[0] / g[1]);
    block.serial = next_serial++;
    ++blocks;
    runner.run_block();
  }
}

}  // namespace ptx
