// machine.h: what executes decoded PTX: device memory with shadows, blocks, warps, and the list of findings.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/ptx/module.h"

namespace ptx {

constexpr uint64_t kDeviceMemory = 24ull << 30;
constexpr uint64_t kArenaBytes = 1ull << 38;  // of addresses: device memory, pinned host memory, gaps
constexpr uint64_t kArenaBase = 0x100000000000ull;
constexpr uint64_t kSharedWindow = 0x0a00000000000000ull, kLocalWindow = 0x0b00000000000000ull,
                   kParamWindow = 0x0c00000000000000ull;
constexpr uint32_t kSharedBase = 1024;  // what newer GPUs keep for themselves at the start

// Who read and wrote 4 bytes last. `block` is the serial number of a block among all that ever ran (global memory), or
// of a stretch between two barriers (shared memory). info: thread 0-9, bytes 10-13, several threads 14, several warps
// 15, 16 (blocks); 17-31: barriers passed so far (global memory). wsync: warp barriers that the writer had passed,
// rorder: the same of the reader, or all warp-synchronous instructions. wfence, rfence: fences of the thread.
struct Access {
  uint32_t wblock, winfo, rblock, rinfo;
  uint16_t wsync, rorder;
  uint16_t wfence, rfence;
};

struct Allocation {
  uint64_t lo, hi;
  bool host;
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Copy {  // a cp.async under way
  uint32_t lane, group, to, size;
  uint64_t ptx;
  uint8_t data[16], defined[16];
  const Instruction* inst;
};

struct Group {
  int pc;
  uint32_t mask;
  bool wait;
};

// An atomic operation on an address where other blocks have arrived before.
struct Arrival {
  uint64_t address;
  size_t before;  // how many
  uint32_t thread, epoch;
  uint16_t fences;  // that the thread had passed
};

struct Block {
  uint32_t ctaid[3];
  uint32_t serial;  // among all blocks
  uint32_t epoch;   // of shared memory: never the same twice
  uint32_t first_epoch;
  // For each thread: fences passed, how many it had passed at the last barrier, the epoch of the last one.
  std::vector<uint16_t> fences, fences_at_barrier;
  std::vector<uint32_t> fence_epoch;
  std::vector<Arrival> arrivals;
};

struct Warp {
  uint8_t* base[2];
  uint32_t* def;
  uint32_t* pred;
  uint32_t* pdef;
  Function* function;
  std::vector<Group> groups;
  uint32_t alive, full;
  int index;
  bool at_barrier;
  const Instruction* barrier;
  uint32_t sync_epoch;      // warp barriers passed
  uint32_t converge_epoch;  // warp-synchronous instructions of all its threads passed
  std::vector<Copy> copies;
  uint32_t committed[32];
  uint8_t* local;  // 32 times local_bytes
  uint8_t* local_defined;
};

struct Machine {
  // settings, from the environment
  int seed = 0;
  bool noise = false, truncate_mma = false, strict = false;
  int architecture = 0;  // of the program's PTX: 90 for compute_90a
  int shared_kib = 0;    // that a block may have, 0: as the architecture has
  // device memory
  std::map<uint64_t, Allocation> allocations;  // by their end
  uint64_t generation = 1, allocated = 0;
  uint8_t* defined = nullptr;          // a byte for each byte of the arena
  Access* accesses = nullptr;          // one for 4 bytes
  std::map<uint64_t, uint64_t> holes;  // free ranges of the arena: begin, end
  // the launch that runs
  Function* function = nullptr;
  Module* module = nullptr;
  uint8_t* params = nullptr;
  uint64_t param_bytes = 0;
  Block block = {};
  uint32_t grid[3], dim[3];
  std::map<uint32_t, std::vector<uint16_t>> published;  // by blocks that arrived: fences_at_barrier of their threads
  std::map<uint64_t, std::vector<uint32_t>> arrived;  // blocks, in their order, by the address of the atomic operation
  uint32_t first_serial = 1, next_serial = 1, next_epoch = 1;
  uint32_t shared_bytes = 0;                    // static and dynamic; addresses start at kSharedBase
  std::vector<uint8_t> shared, shared_defined;  // defined: 0 no, 1 yes, 2 a copy is under way
  std::vector<Access> shared_accesses;
  uint64_t random_state = 1;
  // statistics and findings
  uint64_t launches = 0, blocks = 0;
  std::vector<std::string> findings;  // "category: text"
  std::set<std::string> reported;     // category and source line of each

  void* allocate(uint64_t bytes, bool host);
  bool release(void* p);
  const Allocation* find(uint64_t address) const;
  void mark_defined(const void* p, uint64_t bytes, bool defined = true);
  bool is_arena(uint64_t a) const { return a >= kArenaBase && a < kArenaBase + kArenaBytes; }
  uint64_t shadow_index(uint64_t a) const { return a - kArenaBase; }
  uint32_t random() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random_state >> 33);
  }
  void launch(Module& module, Function& function, const uint32_t grid[3], const uint32_t dim[3],
              uint64_t dynamic_shared, void** arguments);
};
extern Machine machine;

void setup();  // from the environment, once

// A finding: printed and kept, once for each category and source line. The lane is the first of `lanes`.
void report(const char* category, const Warp& w, const Instruction& i, uint32_t lanes, const char* format, ...)
    __attribute__((format(printf, 5, 6)));
// The same for what the host does.
void report_host(const char* category, const char* format, ...) __attribute__((format(printf, 2, 3)));
std::string where(const Instruction& i);

inline int first_lane(uint32_t m) { return __builtin_ctz(m); }

// ---- accesses, for races

// What orders blocks: a thread's fence after its accesses, a barrier, an atomic operation; then the same operation of
// another block, a barrier unless it is the same thread, and a fence.
void fence(uint32_t thread);
void arrive(uint64_t address, uint32_t thread);
void pass_barrier();  // of the whole block

enum Conflict : uint8_t { NONE, WARP, BLOCK, GRID };

// `bytes`: which of the four. What orders two accesses: threads of different blocks: arrivals; of different warps: a
// barrier of the block; of one warp: __syncwarp. A write after another lane's read is also in order when all lanes have
// passed a shuffle or another warp-synchronous instruction in between, because they have the values of their loads then
// (not with PTXSIM_STRICT: a load whose value the instruction does not need might come later).
Conflict global_read(Access& a, const Warp& w, uint32_t lane, uint32_t bytes, bool& written_here);
Conflict global_write(Access& a, const Warp& w, uint32_t lane, uint32_t bytes);
Conflict shared_read(Access& a, const Warp& w, uint32_t lane, uint32_t bytes);
Conflict shared_write(Access& a, const Warp& w, uint32_t lane, uint32_t bytes);

}  // namespace ptx
