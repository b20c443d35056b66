// scheduler.cpp: see scheduler.h. A block from its beginning to its end.
#include "tests/cuda_on_cpu/scheduler.h"

#include <algorithm>
#include <bit>
#include <csignal>

#include "tests/cuda_on_cpu/sanitizer.h"

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace cuda_on_cpu {

constinit thread_local unsigned char* block_shared_memory = nullptr;
constinit thread_local Scheduler* scheduler_of_thread = nullptr;

Scheduler::Scheduler() : threads_(kMaxThreads), warps_(kMaxThreads / kLanes), crash_stack_(64 << 10) {
  // A thread that has used up its stack can only be reported on another one.
  stack_t stack = {};
  stack.ss_sp = crash_stack_.data();
  stack.ss_size = crash_stack_.size();
  if (!kAddressSanitizer) sigaltstack(&stack, nullptr);
}

void Scheduler::start_block(uint3 block_index) {
  const dim3 size = launch_->block;
  blockIdx = block_index;
  count_ = live_ = size.x * size.y * size.z;
  at_barrier_ = 0;
  const uint64_t block_number =
      block_index.x + uint64_t{launch_->grid.x} * (block_index.y + uint64_t{launch_->grid.y} * block_index.z);
  random_.reset((seed() * 0x9e3779b97f4a7c15u + launch_->number) * 0xd1342543de82ef95u + block_number);
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = threads_[i];
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.fiber = nullptr;
    thread.waiting_for = nullptr;
    thread.barriers_passed = 0;
  }
  const unsigned warps = (count_ + kLanes - 1) / kLanes;
  for (unsigned w = 0; w < warps; ++w) {
    const unsigned lanes = std::min(kLanes, count_ - w * kLanes);
    Warp& warp = warps_[w];
    warp.existing = warp.ready = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warp.at_barrier = warp.exited = warp.arrived = 0;
  }
  ready_warps_ = warps == 32 ? ~0u : (1u << warps) - 1;
  warp_ = random_.below(warps);
}

void Scheduler::run(const Launch& launch, uint3 block_index) {
  launch_ = &launch;
  blockDim = launch.block;
  gridDim = launch.grid;
  shared_.start_block(launch.shared_bytes);
  block_shared_memory = shared_.begin();
  start_block(block_index);
  pick();
  running_ = &main_;
  resume_current();  // returns after the last thread has ended
  if (const unsigned char* damaged = shared_.damage()) {
    fail("something wrote " + shared_.describe(damaged) + "\n  in kernel " + kernel_name(launch.function) + ", block " +
         text(block_index));
  }
  block_shared_memory = nullptr;
  launch_ = nullptr;
}

void Scheduler::fiber_main() {
  Scheduler& self = *scheduler_of_thread;
  for (;;) {
    self.launch_->kernel();
    self.exit_thread();
    Fiber* const fiber = self.running_;
    if (!self.pick()) {
      if (self.live_ != 0) self.deadlock();
      self.idle_.push_back(fiber);
      self.running_ = &self.main_;
      Fiber::switch_to(*fiber, self.main_);
    } else if (self.threads_[self.current_].fiber != nullptr) {
      self.idle_.push_back(fiber);
      self.resume_current();
    }
  }
}

void Scheduler::exit_thread() {
  Thread& thread = threads_[current_];
  if (!thread.copies.empty())
    error("a thread ends with asynchronous copies that it never waited for", {"kernel end", 0});
  Warp& warp = warps_[current_ / kLanes];
  warp.exited |= 1u << current_ % kLanes;
  if (warp.arrived != 0)
    error("the thread ends while lanes of its warp wait for it in " + std::string(warp.operation), warp.site);
  --live_;
  if (at_barrier_ != 0) {
    if (thread.barriers_passed != 0) {
      error("the thread ends after " + std::to_string(thread.barriers_passed) +
                " barriers while others wait at one more: a barrier in a divergent branch",
            barrier_site_);
    }
    if (at_barrier_ == live_) release_barrier();
  }
}

void Scheduler::release_barrier() {
  at_barrier_ = 0;
  for (unsigned w = 0; w * kLanes < count_; ++w) {
    Warp& warp = warps_[w];
    if (warp.at_barrier == 0) continue;
    for (uint32_t lanes = warp.at_barrier; lanes != 0; lanes &= lanes - 1) {
      Thread& thread = threads_[w * kLanes + static_cast<unsigned>(std::countr_zero(lanes))];
      ++thread.barriers_passed;
      thread.waiting_for = nullptr;
    }
    warp.ready |= warp.at_barrier;
    warp.at_barrier = 0;
    ready_warps_ |= 1u << w;
  }
}

void block_barrier(Site site) { running_scheduler("__syncthreads").barrier(site); }

void warp_rendezvous(const char* operation, unsigned mask, Complete complete, void* arguments, Site site) {
  running_scheduler(operation).rendezvous(operation, mask, complete, arguments, site);
}

}  // namespace cuda_on_cpu
