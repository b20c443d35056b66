// scheduler.h: the insides of block.h: the threads of a block and what they wait for. Used by scheduler.cpp, which runs
// them, and block.cpp, which is what kernels call and what reports are made of.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tests/cuda_on_cpu/async_copy.h"
#include "tests/cuda_on_cpu/block.h"
#include "tests/cuda_on_cpu/fiber.h"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/shared_memory.h"

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
// waits is compiled in one piece, because of the returns after a switch.
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

}  // namespace cuda_on_cpu
