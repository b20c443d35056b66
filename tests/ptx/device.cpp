// device.cpp: the one device of the CUDA runtime in front of the interpreter, and its memory.
#include "tests/ptx/device.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "tests/ptx/machine.h"
#include "tests/ptx/stream.h"

using ptx::machine;

namespace {

constexpr int kMultiprocessors = 108, kClock = 1410000, kMemoryClock = 1215000, kMemoryBus = 5120;

// What a copy or fill touches must lie in one allocation, or in memory that CUDA does not know.
bool range_ok(const void* p, size_t bytes, const char* what) {
  const auto lock = lock_device();
  const uint64_t address = reinterpret_cast<uint64_t>(p);
  if (!machine.is_arena(address)) return true;
  const ptx::Allocation* const found = machine.find(address);
  if (found && address + bytes <= found->hi) return true;
  ptx::report_host("copy", "%s %zu bytes at %p: outside every allocation", what, bytes, p);
  return false;
}

}  // namespace

int most_shared_memory() {
  const int arch = machine.architecture;
  const int kib = arch == 90 || arch == 100 ? 227 : arch == 80 ? 163 : 99;
  return (machine.shared_kib ? machine.shared_kib : kib) << 10;
}

extern "C" {

// ---- properties

const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "unspecified error";
  }
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "PTX interpreter");
  properties->totalGlobalMem = ptx::kDeviceMemory;
  properties->major = machine.architecture / 10;
  properties->minor = machine.architecture % 10;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->multiProcessorCount = kMultiprocessors;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = static_cast<size_t>(most_shared_memory());
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(most_shared_memory()) + 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->l2CacheSize = 40 << 20;
  properties->memoryBusWidth = kMemoryBus;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrPageableMemoryAccess: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = most_shared_memory() + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = most_shared_memory(); break;
    case cudaDevAttrClockRate: *value = kClock; break;
    case cudaDevAttrMemoryClockRate: *value = kMemoryClock; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = kMemoryBus; break;
    default: ptx::fail("cudaDeviceGetAttribute " + std::to_string(attribute));
  }
  return cudaSuccess;
}

// ---- memory

cudaError_t cudaMalloc(void** p, size_t bytes) {
  const auto lock = lock_device();
  *p = machine.allocate(std::max<size_t>(bytes, 1), false);
  return returned(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  const auto lock = lock_device();
  if (!machine.release(p)) {
    ptx::report_host("free", "cudaFree of %p, which is not allocated", p);
    return returned(cudaErrorInvalidValue);
  }
  return wait_for_device();
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  const auto lock = lock_device();
  *p = machine.allocate(std::max<size_t>(bytes, 1), true);
  return returned(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMallocHost(p, bytes); }
cudaError_t cudaFreeHost(void* p) {
  const auto lock = lock_device();
  return returned(machine.release(p) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = ptx::kDeviceMemory;
  *free = ptx::kDeviceMemory - machine.allocated;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  *attributes = {};
  const auto lock = lock_device();
  const ptx::Allocation* const found = machine.find(reinterpret_cast<uint64_t>(p));
  attributes->type = !found ? cudaMemoryTypeUnregistered : found->host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (!range_ok(to, bytes, "copying to") || !range_ok(from, bytes, "copying from"))
    return returned(cudaErrorInvalidValue);
  return enqueue(stream, [=] {
    std::memcpy(to, from, bytes);
    const uint64_t t = reinterpret_cast<uint64_t>(to), f = reinterpret_cast<uint64_t>(from);
    if (!machine.is_arena(t)) return;
    if (machine.is_arena(f))
      std::memcpy(machine.defined + machine.shadow_index(t), machine.defined + machine.shadow_index(f), bytes);
    else
      machine.mark_defined(to, bytes);
  });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t copied = cudaMemcpyAsync(to, from, bytes, kind, nullptr), waited = wait_for_device();
  return copied != cudaSuccess ? copied : waited;
}
// Filling with 0xff is how the tests mark what nobody may use: undefined.
cudaError_t cudaMemsetAsync(void* p, int byte, size_t bytes, cudaStream_t stream) {
  if (!range_ok(p, bytes, "filling")) return returned(cudaErrorInvalidValue);
  return enqueue(stream, [=] {
    std::memset(p, byte, bytes);
    machine.mark_defined(p, bytes, (byte & 255) != 255);
  });
}
cudaError_t cudaMemset(void* p, int byte, size_t bytes) { return cudaMemsetAsync(p, byte, bytes, nullptr); }
}
