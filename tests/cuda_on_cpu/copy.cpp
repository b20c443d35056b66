// copy.cpp: copies and fills. As on a GPU, pageable host memory is read before the call returns and a copy into it is
// finished when the call returns, unless the device reaches it by itself; page-locked memory is touched when the
// operation runs.
#include <cstring>
#include <memory>
#include <vector>

#include "tests/cuda_on_cpu/queue.h"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/stream.h"

using namespace cuda_on_cpu;

namespace {

// Host memory, or all of it inside of one device buffer.
bool is_one_buffer(const void* address, size_t bytes) {
  return !touches_device_memory(address) || is_device_range(address, bytes);
}

}  // namespace

cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t handle) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return finish(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return finish(cudaSuccess);
  if (!is_one_buffer(destination, bytes) || !is_one_buffer(source, bytes)) return finish(cudaErrorInvalidValue);
  const bool staged = setting("CUDA_ON_CPU_REACHES_HOST", 0) == 0;
  const bool reads_pageable = staged && !touches_device_memory(source) && !is_pinned(source);
  const bool writes_pageable = staged && !touches_device_memory(destination) && !is_pinned(destination);
  if (reads_pageable || writes_pageable) {
    if (const cudaError_t status = refuse_in_capture(*stream); status != cudaSuccess) return finish(status);
  }
  if (reads_pageable) {
    const auto* begin = static_cast<const unsigned char*>(source);
    const auto staged = std::make_shared<std::vector<unsigned char>>(begin, begin + bytes);
    const auto work = [=] { memcpy(destination, staged->data(), bytes); };
    enqueue(handle, Operation{"copy", work, {}, {}, {destination}});
  } else {
    const auto work = [=] { memmove(destination, source, bytes); };
    enqueue(handle, Operation{"copy", work, {}, {}, {destination, source}});
  }
  if (writes_pageable) drain(*stream);
  return finish(cudaSuccess);
}

cudaError_t cudaMemsetAsync(void* destination, int byte, size_t bytes, cudaStream_t handle) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  if (bytes == 0) return finish(cudaSuccess);
  if (!is_device_range(destination, bytes) && !is_pinned(destination)) return finish(cudaErrorInvalidValue);
  const auto work = [=] { memset(destination, byte, bytes); };
  return enqueue(handle, Operation{"fill", work, {}, {}, {destination}});
}
