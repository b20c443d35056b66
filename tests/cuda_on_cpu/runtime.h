// runtime.h: what the files of the shim's runtime share: errors, the lock, device memory.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_cpu {

// ---- errors: device.cpp

// One lock around every call of the API. Kernels do not take it.
std::recursive_mutex& api_mutex();

// Remembers an error for cudaGetLastError and returns it; the sticky error instead, if there is one.
cudaError_t finish(cudaError_t status);

// An error of the device that stays until the process ends, as after an illegal address.
void set_sticky_error(cudaError_t error);
bool has_sticky_error();

// cudaSuccess, or why there is no device to use.
cudaError_t device_status();

// Bytes that a block of a kernel may have that asks for them.
int shared_memory_per_block();

// ---- execution: execute.cpp

// Runs fn(0) .. fn(count - 1) on the OS threads of the shim.
void parallel_for(uint64_t count, bool small, const std::function<void(uint64_t)>& fn);

// Largest dynamic shared memory that a launch of this kernel may ask for, as set by cudaFuncSetAttribute.
size_t shared_memory_limit(const void* function);

// ---- memory: memory.cpp

// Device memory is out of reach of the host except while the shim executes operations of streams. While one of these
// exists, buffers can be shown; then they are checked and hidden again.
class DeviceMemoryAccess {
 public:
  DeviceMemoryAccess();
  ~DeviceMemoryAccess();
  DeviceMemoryAccess(const DeviceMemoryAccess&) = delete;
  DeviceMemoryAccess& operator=(const DeviceMemoryAccess&) = delete;
};

// Shows the buffers that these addresses are in, or all if there are none.
void show_device_memory(const std::vector<const void*>& addresses);

bool touches_device_memory(const void* address);

// From now on a crash in guarded memory is reported in words.
void watch_for_crashes();

}  // namespace cuda_on_cpu
