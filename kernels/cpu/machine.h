// machine.h: what Linux says about the processor and the memory this process may use.
#pragma once

#include <cstddef>
#include <string>

std::string processor_name();  // model name from /proc/cpuinfo
int usable_cores();            // OMP_NUM_THREADS, else affinity mask, and the control group's CPU quota if that is less
size_t available_memory();     // bytes: MemAvailable, and what the control groups leave if that is less
size_t resident_memory();      // bytes of this process that are in memory
size_t resident_bytes(const void* memory, size_t bytes);  // how many of these are in memory
