// cuda_runtime.h of the tests: enough of the CUDA runtime and of CUDA C++ to compile the files of kernels/cuda/
// unchanged with a plain C++ compiler and to run them on a CPU. Functions behave as NVIDIA documents them; mistakes
// which a GPU answers with wrong numbers stop the program with a report that names kernel, block, thread and place.
//
// Reported: accesses outside of device or shared memory (outside by less than a page: writes only, and only when the
// operations are over; with AddressSanitizer the 4 KB beside a buffer at once), to freed memory, to device memory by
// the host, to host memory by pointers given to a kernel; misaligned wide accesses; barriers in divergent branches;
// lanes that wait in different operations or for lanes that have exited; deadlocks; asynchronous copies never waited
// for; stack overflows. Refused as by the real runtime: launches beyond the limits, what a capture does not permit,
// more memory than the device has. Visible as wrong results, under some seed: missing barriers, missing event waits,
// host buffers reused too early, blocks that rely on each other's order, unwritten memory (NaN), asynchronous copies
// read before they are waited for.
//
// Stricter than a GPU: a barrier or warp operation must be the same line of code for all threads that meet there; a
// warp operation is one of all 32 lanes; a thread that passed one barrier passes all; streams are non-blocking.
//
// What is not checked here: memory fences and the order in which other threads see writes, races that no order of the
// threads makes wrong, and unwritten memory whose NaN is lost (tests/ptx does); the asynchronous proxy (TMA, wgmma);
// registers, spills, __launch_bounds__ and occupancy; blocks that run at the same time but for a few, on as many
// threads as the CPU has; the rounding inside a tensor core (here: one fp32 addition after another) and of the
// approximate functions; pointers to host memory inside of structs; bank conflicts and every other question of speed.
//
// Environment:
//   CUDA_ON_CPU_SEED=1            the order of threads, warps, blocks and streams
//   CUDA_ON_CPU_THREADS=<cores>   OS threads that share the blocks of a kernel
//   CUDA_ON_CPU_ARCH=90           compute capability
//   CUDA_ON_CPU_MEMORY=4294967296 bytes of the device
//   CUDA_ON_CPU_NO_PINNED=0       1: cudaMallocHost fails
//   CUDA_ON_CPU_REACHES_HOST=0    1: the device reaches pageable memory by itself: copies of it are asynchronous
//   CUDA_ON_CPU_DEVICES=1         0: no device
//   CUDA_ON_CPU_DRIVER_TOO_OLD=0  1: a driver older than the runtime
//   CUDA_ON_CPU_FAIL_LAUNCH=      the kernel that ends with an illegal address: "name" for the first one whose name
//                                 contains it, "name:3" for the third
//   CUDA_ON_CPU_LOSE_BLOCK=       of kernels whose name contains it the last block never runs
//   CUDA_LAUNCH_BLOCKING=0        1: a launch waits for the kernel and returns its error
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/vector_types.h"

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorCapturedEvent = 907,
};

enum cudaMemcpyKind {
  cudaMemcpyDefault = 4,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrPageableMemoryAccess = 88,
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};

enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
};

inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDefault = 0, cudaEventDisableTiming = 2;

namespace cuda_on_cpu {
struct Stream;
struct Event;
struct Graph;
struct ExecutableGraph;
}  // namespace cuda_on_cpu

using cudaStream_t = cuda_on_cpu::Stream*;
using cudaEvent_t = cuda_on_cpu::Event*;
using cudaGraph_t = cuda_on_cpu::Graph*;
using cudaGraphExec_t = cuda_on_cpu::ExecutableGraph*;

struct cudaUUID_t {
  char bytes[16];
};

struct cudaDeviceProp {
  cudaUUID_t uuid;
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlockOptin;
  int major, minor, multiProcessorCount;
};

struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void* devicePointer;
  void* hostPointer;
};

struct cudaFuncAttributes {
  int maxDynamicSharedSizeBytes, maxThreadsPerBlock;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// errors and devices: device.cpp
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

// memory: memory.cpp; copies: copy.cpp
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMallocHost(void** memory, size_t bytes);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* destination, int byte, size_t bytes, cudaStream_t stream = nullptr);

// streams and events: stream.cpp; graphs: graph.cpp
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);

#include "cuda_on_cpu/launch.h"
