// cublaslt.cpp: tests/cublaslt on the shim: its products wait in the shim's queues like kernels.
#include "tests/cublaslt/device.h"

#include <cstdio>
#include <utility>

#include "tests/cuda_on_cpu/stream.h"

namespace fake_cublaslt {

cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  return cuda_on_cpu::enqueue(stream, "cublasLtMatmul", std::move(work));
}

bool is_device_range(const void* address, size_t bytes) { return cuda_on_cpu::is_device_range(address, bytes); }

bool is_written(const void*, size_t) { return true; }
void mark_written(const void*, size_t, bool) {}

void report(const char* what) { std::fprintf(stderr, "cublasLtMatmul: %s\n", what); }

}  // namespace fake_cublaslt
