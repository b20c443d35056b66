// memory.cpp: device memory with its shadows, and who accessed what.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "tests/ptx/machine.h"

namespace ptx {

// Kernels register themselves before main(), in other files.
Machine machine __attribute__((init_priority(101)));

namespace {

constexpr uint64_t kGap = 4096, kAlign = 256, kLarge = uint64_t{64} << 20;

template <typename T>
T* reserve(uint64_t bytes, void* where = nullptr) {
  void* const p = mmap(where, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (where ? MAP_FIXED_NOREPLACE : 0), -1, 0);
  if (p == MAP_FAILED) fail("cannot reserve address space");
  return static_cast<T*>(p);
}

int setting(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

}  // namespace

void setup() {
  static bool done = false;
  if (done) return;
  done = true;
  machine.seed = setting("PTXSIM_SEED", 0);
  machine.random_state = static_cast<uint64_t>(machine.seed) * 0x9e3779b97f4a7c15ull + 1;
  machine.noise = setting("PTXSIM_NOISE", 0) != 0;
  machine.truncate_mma = setting("PTXSIM_TRUNCATE", 0) != 0;
  machine.shared_kib = setting("PTXSIM_SHARED_KIB", 0);
  machine.strict = setting("PTXSIM_STRICT", 0) != 0;
  reserve<uint8_t>(kArenaBytes, reinterpret_cast<void*>(kArenaBase));
  machine.defined = reserve<uint8_t>(kArenaBytes);
  machine.accesses = reserve<Access>(kArenaBytes / 4 * sizeof(Access));
  machine.holes[kArenaBase + kGap] = kArenaBase + kArenaBytes;
}

void* Machine::allocate(uint64_t bytes, bool host) {
  setup();
  if (!host && allocated + bytes > kDeviceMemory) return nullptr;
  const uint64_t need = (bytes + kGap + kAlign - 1) / kAlign * kAlign;
  for (auto it = holes.begin(); it != holes.end(); ++it) {
    const auto [begin, end] = *it;
    if (end - begin < need) continue;
    holes.erase(it);
    if (begin + need < end) holes[begin + need] = end;
    allocations[begin + bytes] = {begin, begin + bytes, host};
    if (!host) allocated += bytes;
    ++generation;
    if (bytes <= 64 << 20) std::memset(reinterpret_cast<void*>(begin), 0xff, bytes);
    mark_defined(reinterpret_cast<void*>(begin), bytes, host);
    return reinterpret_cast<void*>(begin);
  }
  return nullptr;
}

const Allocation* Machine::find(uint64_t address) const {
  const auto it = allocations.upper_bound(address);
  return it != allocations.end() && it->second.lo <= address ? &it->second : nullptr;
}

bool Machine::release(void* p) {
  const uint64_t at = reinterpret_cast<uint64_t>(p);
  const Allocation* const found = find(at);
  if (!found || found->lo != at) return false;
  const Allocation a = *found;
  allocations.erase(a.hi);
  if (!a.host) allocated -= a.hi - a.lo;
  ++generation;
  const uint64_t end = at + (a.hi - a.lo + kGap + kAlign - 1) / kAlign * kAlign;
  // What nobody may read any more costs no memory, where it is much; else the next one, at the same place, has it
  // again.
  const auto forget = [](const void* base, uint64_t from, uint64_t to) {
    from = (reinterpret_cast<uint64_t>(base) + from + 4095) & ~4095ull;
    to = (reinterpret_cast<uint64_t>(base) + to) & ~4095ull;
    if (from + kLarge <= to) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
  };
  forget(nullptr, a.lo, a.hi);
  forget(defined, shadow_index(a.lo), shadow_index(a.hi));
  forget(accesses, shadow_index(a.lo) / 4 * sizeof(Access), shadow_index(a.hi) / 4 * sizeof(Access));
  uint64_t begin = at, last = end;
  const auto next = holes.lower_bound(begin);
  if (next != holes.end() && next->first == last) last = next->second, holes.erase(next);
  const auto after = holes.lower_bound(begin);
  if (after != holes.begin() && std::prev(after)->second == begin) begin = std::prev(after)->first;
  holes[begin] = last;
  return true;
}

void Machine::mark_defined(const void* p, uint64_t bytes, bool is) {
  const uint64_t at = reinterpret_cast<uint64_t>(p);
  if (is_arena(at)) std::memset(defined + shadow_index(at), is, bytes);
}

// ---- accesses

namespace {
constexpr uint32_t kLanes = 1 << 14, kWarps = 1 << 15, kBlocks = 1 << 16, kThread = 1023, kEpoch = 0x7fff;
uint32_t bytes_of(uint32_t info) { return info >> 10 & 15; }
uint32_t info(uint32_t thread, uint32_t bytes, uint32_t epoch) { return thread | bytes << 10 | epoch << 17; }
bool same_warp(uint32_t a, uint32_t b) { return (a & kThread) >> 5 == (b & kThread) >> 5; }

struct Accessor {
  uint32_t thread, epoch;
  uint16_t sync, order;
  Accessor(const Warp& w, uint32_t lane)
      : thread(static_cast<uint32_t>(w.index) * 32 + lane),
        epoch((machine.block.epoch - machine.block.first_epoch) & kEpoch),
        sync(static_cast<uint16_t>(w.sync_epoch)),
        order(static_cast<uint16_t>(machine.strict ? w.sync_epoch : w.converge_epoch)) {}

  // Against what threads of this block did since its last barrier.
  Conflict with_write(const Access& a) const {
    if ((a.winfo & kThread) == thread) return NONE;
    if (!same_warp(a.winfo, thread)) return BLOCK;
    return a.wsync == sync ? WARP : NONE;
  }
  Conflict with_reads(const Access& a) const {
    if ((a.rinfo & kWarps) || !same_warp(a.rinfo, thread)) return BLOCK;
    if (a.rorder != order) return NONE;
    return (a.rinfo & kThread) != thread || (a.rinfo & kLanes) ? WARP : NONE;
  }
  // The flags of a new read that follows others since the last barrier.
  uint32_t joined(const Access& a, uint32_t bytes) const {
    const bool overlap = bytes_of(a.rinfo) & bytes;
    if (!same_warp(a.rinfo, thread)) return overlap ? kWarps : 0;
    uint32_t flags = a.rinfo & kWarps;
    if (a.rorder == order) {
      if ((a.rinfo & kThread) == thread)
        flags |= a.rinfo & (kLanes | 15 << 10);
      else if (overlap)
        flags |= kLanes;
    }
    return flags;
  }
  bool wrote(const Access& a) const { return (a.winfo & kThread) == thread && a.wsync == sync; }
};
}  // namespace

void fence(uint32_t thread) {
  ++machine.block.fences[thread];
  machine.block.fence_epoch[thread] = machine.block.epoch;
}

void pass_barrier() {
  machine.block.epoch = machine.next_epoch++;
  machine.block.fences_at_barrier = machine.block.fences;
}

void arrive(uint64_t address, uint32_t thread) {
  Block& block = machine.block;
  if (const auto earlier = machine.arrived.find(address); earlier != machine.arrived.end())
    block.arrivals.push_back({address, earlier->second.size(), thread, block.epoch, block.fences[thread]});
  std::vector<uint16_t> visible = block.fences_at_barrier;
  visible[thread] = block.fences[thread];
  if (std::all_of(visible.begin(), visible.end(), [](uint16_t fences) { return fences == 0; })) return;
  machine.published[block.serial] = std::move(visible);
  machine.arrived[address].push_back(block.serial);
}

namespace {

// The blocks that arrived before this one at the same place, where this thread has passed a fence since.
std::vector<uint32_t> blocks_before(uint32_t thread) {
  const Block& block = machine.block;
  std::vector<uint32_t> serials;
  for (const Arrival& a : block.arrivals) {
    const bool acquired = thread == a.thread ? block.fences[thread] > a.fences : block.fence_epoch[thread] > a.epoch;
    if (!acquired) continue;
    const std::vector<uint32_t>& all = machine.arrived[a.address];
    serials.insert(serials.end(), all.begin(), all.begin() + static_cast<std::ptrdiff_t>(a.before));
  }
  return serials;
}

// Whether what a thread of another block did after so many fences comes before what this thread does now.
bool comes_before(uint32_t serial, uint32_t thread, uint16_t fences, const Accessor& by) {
  const auto published = machine.published.find(serial);
  if (published == machine.published.end() || published->second[thread] <= fences) return false;
  const std::vector<uint32_t> serials = blocks_before(by.thread);
  return std::find(serials.begin(), serials.end(), serial) != serials.end();
}

bool all_come_before(const Accessor& by) {
  std::vector<uint32_t> serials = blocks_before(by.thread);
  std::sort(serials.begin(), serials.end());
  const auto end = std::unique(serials.begin(), serials.end());
  const uint64_t blocks = uint64_t{machine.grid[0]} * machine.grid[1] * machine.grid[2];
  return static_cast<uint64_t>(end - serials.begin()) + 1 >= blocks;
}

}  // namespace

Conflict global_read(Access& a, const Warp& w, uint32_t lane, uint32_t bytes, bool& written_here) {
  const Accessor by(w, lane);
  const uint32_t first = machine.first_serial, own = machine.block.serial;
  Conflict c = NONE;
  if (a.wblock >= first && (bytes_of(a.winfo) & bytes)) {
    written_here = true;
    if (a.wblock != own)
      c = comes_before(a.wblock, a.winfo & kThread, a.wfence, by) ? NONE : GRID;
    else if (a.winfo >> 17 == by.epoch)
      c = by.with_write(a);
  }
  uint32_t next = info(by.thread, bytes, by.epoch);
  if (a.rblock >= first) {
    const bool overlap = bytes_of(a.rinfo) & bytes;
    if (a.rblock != own) {
      if (overlap) next |= kBlocks;
    } else {
      if (overlap) next |= a.rinfo & kBlocks;
      if (a.rinfo >> 17 == by.epoch) next |= by.joined(a, bytes);
    }
  }
  a.rblock = own;
  a.rinfo = next;
  a.rorder = by.order;
  a.rfence = machine.block.fences[by.thread];
  return c;
}

Conflict global_write(Access& a, const Warp& w, uint32_t lane, uint32_t bytes) {
  const Accessor by(w, lane);
  const uint32_t first = machine.first_serial, own = machine.block.serial;
  Conflict c = NONE;
  const bool mine = a.wblock == own && by.wrote(a) && a.winfo >> 17 == by.epoch;
  if (a.wblock >= first && (bytes_of(a.winfo) & bytes)) {
    if (a.wblock != own)
      c = comes_before(a.wblock, a.winfo & kThread, a.wfence, by) ? NONE : GRID;
    else if (a.winfo >> 17 == by.epoch)
      c = by.with_write(a);
  }
  if (c == NONE && a.rblock >= first && (bytes_of(a.rinfo) & bytes)) {
    if (a.rinfo & kBlocks)
      c = all_come_before(by) ? NONE : GRID;
    else if (a.rblock != own)
      c = comes_before(a.rblock, a.rinfo & kThread, a.rfence, by) ? NONE : GRID;
    else if (a.rinfo >> 17 == by.epoch)
      c = by.with_reads(a);
  }
  a.wblock = own;
  a.winfo = info(by.thread, bytes | (mine ? bytes_of(a.winfo) : 0), by.epoch);
  a.wsync = by.sync;
  a.wfence = machine.block.fences[by.thread];
  return c;
}

Conflict shared_read(Access& a, const Warp& w, uint32_t lane, uint32_t bytes) {
  const Accessor by(w, lane);
  const uint32_t epoch = machine.block.epoch;
  const Conflict c = a.wblock == epoch && (bytes_of(a.winfo) & bytes) ? by.with_write(a) : NONE;
  a.rinfo = info(by.thread, bytes, 0) | (a.rblock == epoch ? by.joined(a, bytes) : 0);
  a.rblock = epoch;
  a.rorder = by.order;
  return c;
}

Conflict shared_write(Access& a, const Warp& w, uint32_t lane, uint32_t bytes) {
  const Accessor by(w, lane);
  const uint32_t epoch = machine.block.epoch;
  Conflict c = a.wblock == epoch && (bytes_of(a.winfo) & bytes) ? by.with_write(a) : NONE;
  if (c == NONE && a.rblock == epoch && (bytes_of(a.rinfo) & bytes)) c = by.with_reads(a);
  const bool mine = a.wblock == epoch && by.wrote(a);
  a.wblock = epoch;
  a.winfo = info(by.thread, bytes | (mine ? bytes_of(a.winfo) : 0), 0);
  a.wsync = by.sync;
  return c;
}

// ---- findings

namespace {
void print_finding(const char* category, const std::string& where, const std::string& key, const char* format,
                   va_list list) {
  if (!machine.reported.insert(std::string(category) + key).second) return;
  char text[600];
  vsnprintf(text, sizeof text, format, list);
  machine.findings.push_back(std::string(category) + ": " + text + where);
  std::fprintf(stderr, "PTXSIM %s\n", machine.findings.back().c_str());
}
}  // namespace

std::string where(const Instruction& i) {
  const auto file = machine.module->files.find(i.file);
  return " at " + (file == machine.module->files.end() ? "?" : file->second) + ":" + std::to_string(i.line) + " [" +
         machine.function->name + ", PTX line " + std::to_string(i.ptx_line) + ": " + i.text + "]";
}

void report(const char* category, const Warp& w, const Instruction& i, uint32_t lanes, const char* format, ...) {
  va_list list;
  va_start(list, format);
  const int lane = lanes ? first_lane(lanes) : 0;
  print_finding(category,
                where(i) + " block " + std::to_string(machine.block.ctaid[0]) + "," +
                    std::to_string(machine.block.ctaid[1]) + " thread " + std::to_string(w.index * 32 + lane),
                machine.function->name + std::to_string(i.file) + ":" + std::to_string(i.line), format, list);
  va_end(list);
}

void report_host(const char* category, const char* format, ...) {
  va_list list;
  va_start(list, format);
  char key[300];
  va_list copy;
  va_copy(copy, list);
  vsnprintf(key, sizeof key, format, copy);
  va_end(copy);
  print_finding(category, "", key, format, list);
  va_end(list);
}

}  // namespace ptx
