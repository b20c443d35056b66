// stream.h: what the parts of the CUDA runtime share: errors, and work in the order of the host's calls.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>

// Threads of the host take turns: the interpreter is one machine.
std::unique_lock<std::recursive_mutex> lock_device();

// Remembered for cudaGetLastError unless it is a success.
cudaError_t returned(cudaError_t error);
// The error of a kernel: reported by the next call that waits for the device, then forgotten, so that more tests can
// run.
void set_kernel_error(cudaError_t error);
cudaError_t wait_for_device();

// Done at once, or recorded where the stream is being captured.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);
