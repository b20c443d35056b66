// machine.h: what Linux says about the processor and the memory this process may use.
#pragma once

#include <cstddef>
#include <string>

inline constexpr int kMostThreads = 1024;  // above any machine's cores; each has a stack and buffers of its own

// OMP_NUM_THREADS, else the affinity mask, and the control groups' CPU quotas if less. `root` has /proc and
// /sys/fs/cgroup below it.
int usable_cores(const std::string& root = "");
// OMP_NUM_THREADS, else what each of so many processes that share them has of usable_cores(), at least 1.
int share_of_cores(int processes);
// Bytes: MemAvailable, and what the control groups leave if less.
size_t available_memory(const std::string& root = "");

// Bytes that this process may still map under its limits on address space and data (ulimit -v and -d); SIZE_MAX
// without one. Such a limit counts what is mapped, not what is used.
size_t mappable_memory();

std::string processor_name();                             // model name from /proc/cpuinfo
size_t resident_memory();                                 // bytes of this process that are in memory
size_t resident_bytes(const void* memory, size_t bytes);  // how many of these are in memory
