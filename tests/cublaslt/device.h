// device.h: what the stand-in for cuBLASLt asks of the CUDA runtime that it is linked with, that of tests/cuda_on_cpu
// or of tests/ptx.
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <functional>

namespace fake_cublaslt {

// Appends work to the stream, or to the graph that it is captured into: it may run several times.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);

// Whether all of these bytes lie inside one live allocation of the device.
bool is_device_range(const void* address, size_t bytes);

// Whether these bytes were written since they were allocated. Only tests/ptx knows; elsewhere what was not written is
// NaN.
bool is_written(const void* address, size_t bytes);
void mark_written(const void* address, size_t bytes, bool written);

// A caller's mistake that a GPU would answer with garbage or a crash.
void report(const char* what);

}  // namespace fake_cublaslt
