// stream.h: the work that the host has given to the device and that has not run yet. Nothing runs when it is enqueued:
// a stream is a queue, and its head runs when a host synchronisation needs it, or earlier or later as the seed decides
// and events allow. For the CUDA runtime of the shim, and for libraries that enqueue work of their own (cublaslt.cpp).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace cuda_on_cpu {

// Appends work to a stream, or to the graph that the stream is captured into. `work` runs on the host, possibly several
// times (graphs) and after this returns: it must own what it reads except device memory, which it may access freely.
// `name` appears in reports. Returns the error of an earlier launch, if the device has one.
cudaError_t enqueue(cudaStream_t stream, std::string name, std::function<void()> work);

// How often which kernel was launched, and which function of a library enqueued work, by name; captured or not.
const std::map<std::string, uint64_t>& launches();

// True when [address, address + bytes) lies inside one live device allocation: for checks of a library's arguments.
bool is_device_range(const void* address, size_t bytes);

// True when the memory came from cudaMallocHost: a copy reads it when it runs, not when it is enqueued.
bool is_pinned(const void* address);

}  // namespace cuda_on_cpu
