// device.cpp: errors, and the device that the shim pretends to have.
#include <cstring>

#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/runtime.h"

namespace cuda_on_cpu {

namespace {

thread_local cudaError_t last_error = cudaSuccess;
cudaError_t sticky_error = cudaSuccess;

}  // namespace

std::recursive_mutex& api_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

cudaError_t finish(cudaError_t status) {
  if (sticky_error != cudaSuccess) status = sticky_error;
  if (status != cudaSuccess && status != cudaErrorNotReady) last_error = status;
  return status;
}

void set_sticky_error(cudaError_t error) { sticky_error = error; }
bool has_sticky_error() { return sticky_error != cudaSuccess; }

cudaError_t device_status() {
  if (sticky_error != cudaSuccess) return sticky_error;
  if (setting("CUDA_ON_CPU_DRIVER_TOO_OLD", 0) != 0) return cudaErrorInsufficientDriver;
  return setting("CUDA_ON_CPU_DEVICES", 1) == 0 ? cudaErrorNoDevice : cudaSuccess;
}

namespace {
int architecture() { return static_cast<int>(setting("CUDA_ON_CPU_ARCH", 90)); }
}  // namespace

int shared_memory_per_block() {
  switch (architecture()) {
    case 80:
    case 87: return 163 << 10;
    case 86:
    case 89:
    case 120: return 99 << 10;
    default: return 227 << 10;
  }
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaGetLastError() {
  const cudaError_t error = has_sticky_error() ? sticky_error : last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return has_sticky_error() ? sticky_error : last_error; }

// The words of the real runtime where programs show them to their users.
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion: return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnmatched: return "capture was not initiated in this stream";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_status() == cudaSuccess ? static_cast<int>(setting("CUDA_ON_CPU_DEVICES", 1)) : 0;
  return finish(device_status());
}

static thread_local int current_device = 0;

cudaError_t cudaSetDevice(int device) {
  if (device_status() != cudaSuccess) return finish(device_status());
  if (device < 0 || device >= static_cast<int>(setting("CUDA_ON_CPU_DEVICES", 1)))
    return finish(cudaErrorInvalidDevice);
  current_device = device;
  return finish(cudaSuccess);
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return finish(device_status());
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device_status() != cudaSuccess) return finish(device_status());
  if (device < 0 || device >= static_cast<int>(setting("CUDA_ON_CPU_DEVICES", 1)))
    return finish(cudaErrorInvalidDevice);
  *properties = {};
  strcpy(properties->name, "CUDA on CPU");
  properties->uuid.bytes[0] = static_cast<char>(device);
  size_t free = 0;
  cudaMemGetInfo(&free, &properties->totalGlobalMem);
  properties->sharedMemPerBlockOptin = static_cast<size_t>(shared_memory_per_block());
  properties->major = architecture() / 10;
  properties->minor = architecture() % 10;
  properties->multiProcessorCount = 16;
  return finish(cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (device_status() != cudaSuccess) return finish(device_status());
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_memory_per_block() + 1024; break;
    case cudaDevAttrPageableMemoryAccess: *value = setting("CUDA_ON_CPU_REACHES_HOST", 0) != 0; break;
  }
  return finish(cudaSuccess);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = setting("CUDA_ON_CPU_DRIVER_TOO_OLD", 0) != 0 ? 11040 : CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
