// block.cpp: what kernels and the runtime ask of the block that runs on their OS thread, and what reports say about it.
#include "tests/cuda_on_cpu/block.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "tests/cuda_on_cpu/scheduler.h"

namespace cuda_on_cpu {

namespace {

Scheduler& scheduler() {
  static thread_local std::unique_ptr<Scheduler> owner;
  if (!owner) {
    owner = std::make_unique<Scheduler>();
    scheduler_of_thread = owner.get();
  }
  return *scheduler_of_thread;
}

}  // namespace

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string hex(unsigned mask) {
  char buffer[16];
  snprintf(buffer, sizeof buffer, "0x%08x", mask);
  return buffer;
}

std::string Scheduler::describe() const {
  return "kernel " + kernel_name(launch_->function) + ", block " + text(blockIdx) + ", thread " +
         text(threads_[current_].index);
}

// Threads that wait for the same are listed together, as ranges of their numbers in the block.
std::string Scheduler::who_waits_where() const {
  std::map<std::string, std::vector<unsigned>> places;
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& thread = threads_[i];
    const Warp& warp = warps_[i / kLanes];
    const uint32_t bit = 1u << i % kLanes;
    std::string where;
    if ((warp.exited & bit) != 0) {
      where = "exited";
    } else if (thread.waiting_for == nullptr) {
      where = i == current_ ? "running" : "can run";
    } else {
      where = std::string("wait in ") + thread.waiting_for + " at " + text(thread.site);
    }
    places[where].push_back(i);
  }
  std::string report;
  for (const auto& [where, numbers] : places) {
    report += "  threads";
    for (size_t i = 0; i < numbers.size();) {
      size_t end = i;
      while (end + 1 < numbers.size() && numbers[end + 1] == numbers[end] + 1) ++end;
      report += " " + std::to_string(numbers[i]) + (end > i ? "-" + std::to_string(numbers[end]) : "");
      i = end + 1;
    }
    report += ": " + where + "\n";
  }
  return report;
}

void Scheduler::deadlock() {
  fail("deadlock: no thread of the block can go on\n  kernel " + kernel_name(launch_->function) + ", block " +
       text(blockIdx) + "\n" + who_waits_where());
}

void Scheduler::error(const std::string& what, Site site) {
  fail(what + "\n  at " + text(site) + "\n  in " + describe() + "\n" + who_waits_where());
}

bool Scheduler::is_stack_overflow(const void* address) const {
  return std::ranges::any_of(fibers_, [&](const auto& fiber) { return fiber->is_guard(address); });
}

void run_block(const Launch& launch, uint3 block_index) { scheduler().run(launch, block_index); }

unsigned lane_index() { return running_scheduler("a warp operation").current_number() % kLanes; }

AsyncCopies& async_copies() { return running_scheduler("cp.async").current().copies; }

bool in_shared_memory(const void* address, size_t bytes) {
  const SharedMemory& shared = running_scheduler("shared memory").shared();
  const auto* p = static_cast<const unsigned char*>(address);
  return p >= shared.begin() && p + bytes <= shared.begin() + shared.bytes();
}

void kernel_error(const char* what, Site site) { running_scheduler(what).error(what, site); }

bool is_stack_overflow(const void* address) {
  return scheduler_of_thread != nullptr && scheduler_of_thread->is_stack_overflow(address);
}

std::string describe_shared_address(const void* address) {
  if (scheduler_of_thread == nullptr || !scheduler_of_thread->active()) return "";
  return scheduler_of_thread->shared().describe(static_cast<const unsigned char*>(address));
}

std::string running_thread() {
  return scheduler_of_thread != nullptr && scheduler_of_thread->active() ? scheduler_of_thread->describe() : "";
}

}  // namespace cuda_on_cpu
