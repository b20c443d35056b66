// scheduler.h: the insides of block.h: the threads of a block, what they wait for and which one goes on. Used by
// scheduler.cpp, which runs them, warp_operations.cpp, where they wait for each other, and block.cpp, which is what
// else kernels call and what reports are made of.
#pragma once

#include <bit>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "tests/cuda_on_cpu/async_copy.h"
#include "tests/cuda_on_cpu/block.h"
#include "tests/cuda_on_cpu/fiber.h"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/shared_memory.h"

#define AT_A_SWITCH inline __attribute__((always_inline))

namespace cuda_on_cpu {

inline constexpr unsigned kMaxThreads = 1024, kLanes = 32;

struct Thread {
  uint3 index;
  Fiber* fiber;             // that it is suspended on; null before it started
  const char* waiting_for;  // operation; null while it can run
  Site site;
  unsigned barriers_passed;
  AsyncCopies copies;
};

struct Warp {
  uint32_t existing, ready, at_barrier, exited;  // sets of lanes
  uint32_t arrived;                              // at the warp operation that follows, where others wait for the rest
  const char* operation;
  Site site;
  void* arguments[kLanes];
};

// Runs blocks on one OS thread, one after another, and keeps the stacks for the next one. What a thread does where it
// waits is compiled in one piece, into each operation of warps, because of the returns after a switch.
class Scheduler {
 public:
  Scheduler();

  void run(const Launch& launch, uint3 block_index);
  void barrier(Site site);
  const SharedMemory& shared() const { return shared_; }
  void rendezvous(const char* operation, unsigned mask, Complete complete, void* arguments, Site site);
  [[noreturn]] void error(const std::string& what, Site site);
  std::string describe() const;
  Thread& current() { return threads_[current_]; }
  unsigned current_number() const { return current_; }
  bool is_stack_overflow(const void* address) const;
  bool active() const { return launch_ != nullptr; }

 private:
  // What every fiber does: runs the current thread, then the next one.
  static void fiber_main();
  void start_block(uint3 block_index);
  // The next thread that can run becomes the current one; false when there is none.
  bool pick();
  // Leaves the current thread, which waits, for another one; returns when it can go on.
  void suspend();
  // Goes on with the current thread, on the fiber where it waits or else on an idle one.
  void resume_current();
  void release_barrier();
  void exit_thread();
  [[noreturn]] void deadlock();
  std::string who_waits_where() const;

  const Launch* launch_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<char> crash_stack_;
  uint32_t ready_warps_ = 0;
  unsigned current_ = 0, warp_ = 0, count_ = 0, live_ = 0, at_barrier_ = 0;
  Site barrier_site_{};
  Random random_;
  SharedMemory shared_;
  Fiber main_;
  Fiber* running_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

// Of the calling OS thread; null before it has run a block.
extern constinit thread_local Scheduler* scheduler_of_thread;

// The same; ends the program with a report when no block is running.
inline Scheduler& running_scheduler(const char* operation) {
  if (scheduler_of_thread == nullptr || !scheduler_of_thread->active())
    fail(std::string(operation) + " outside of a kernel");
  return *scheduler_of_thread;
}

// "file:line", "(x, y, z)", "0x0000ffff".
std::string text(Site site);
std::string text(uint3 v);
std::string hex(unsigned mask);

// ---- what a thread does where it waits

inline bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

AT_A_SWITCH bool Scheduler::pick() {
  if (ready_warps_ == 0) return false;
  const uint32_t random = random_.next();
  // Another warp when this one cannot go on, and now and then although it could.
  if ((ready_warps_ >> warp_ & 1) == 0 || (random >> 27) == 0) {
    const unsigned turn = random & 31;
    warp_ = (static_cast<unsigned>(std::countr_zero(std::rotr(ready_warps_, static_cast<int>(turn)))) + turn) & 31;
  }
  Warp& warp = warps_[warp_];
  const unsigned turn = random >> 5 & 31;
  const unsigned lane =
      (static_cast<unsigned>(std::countr_zero(std::rotr(warp.ready, static_cast<int>(turn)))) + turn) & 31;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps_ &= ~(1u << warp_);
  current_ = warp_ * kLanes + lane;
  threadIdx = threads_[current_].index;
  return true;
}

AT_A_SWITCH void Scheduler::resume_current() {
  Fiber* from = running_;
  Fiber* to = threads_[current_].fiber;
  if (to == nullptr) {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&Scheduler::fiber_main, fibers_.size()));
      idle_.push_back(fibers_.back().get());
    }
    to = idle_.back();
    idle_.pop_back();
  }
  running_ = to;
  Fiber::switch_to(*from, *to);
}

AT_A_SWITCH void Scheduler::suspend() {
  threads_[current_].fiber = running_;
  if (!pick()) deadlock();
  if (threads_[current_].fiber != running_) resume_current();
}

AT_A_SWITCH void Scheduler::barrier(Site site) {
  Thread& thread = threads_[current_];
  if (at_barrier_ == 0) {
    barrier_site_ = site;
  } else if (!same(site, barrier_site_)) {
    error("a barrier in a divergent branch: this thread is here while others wait at " + text(barrier_site_), site);
  }
  thread.waiting_for = "__syncthreads";
  thread.site = site;
  warps_[current_ / kLanes].at_barrier |= 1u << current_ % kLanes;
  // The last one waits, too, so that anyone may be first to go on.
  if (++at_barrier_ == live_) release_barrier();
  suspend();
}

AT_A_SWITCH void Scheduler::rendezvous(const char* operation, unsigned mask, Complete complete, void* arguments,
                                       Site site) {
  Thread& thread = threads_[current_];
  Warp& warp = warps_[current_ / kLanes];
  const unsigned lane = current_ % kLanes;
  const uint32_t bit = 1u << lane;
  if (mask != ~0u) error(std::string(operation) + " with mask " + hex(mask) + ": only whole warps are there", site);
  if (warp.existing != ~0u) error(std::string(operation) + " in a warp that has not 32 lanes", site);
  if (warp.exited != 0) error(std::string(operation) + " waits for lanes that have exited: " + hex(warp.exited), site);
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.site = site;
  } else if (!same(site, warp.site) || (operation != warp.operation && strcmp(operation, warp.operation) != 0)) {
    error("lanes of a warp wait for each other in different operations: " + std::string(operation) + " against " +
              warp.operation + " at " + text(warp.site),
          site);
  }
  warp.arguments[lane] = arguments;
  warp.arrived |= bit;
  if (warp.arrived != ~0u) {
    thread.waiting_for = operation;
    thread.site = site;
    suspend();
    return;
  }
  warp.arrived = 0;
  if (complete != nullptr) complete(warp.arguments);
  for (unsigned l = 0; l < kLanes; ++l) threads_[current_ - lane + l].waiting_for = nullptr;
  warp.ready |= ~bit;
  ready_warps_ |= 1u << current_ / kLanes;
  // The last one to come is not always the first one to go.
  if ((random_.next() & 3) != 0) return;
  warp.ready |= bit;
  suspend();
}

#undef AT_A_SWITCH

}  // namespace cuda_on_cpu
