// cuda_backend.cu: a GPU as a device: which one, its memory, streams, events, graphs, and what the banner says about
// it. The operations are in the other files of this folder.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/cpu/machine.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda_workspace.h"
#include "kernels/dispatch.h"

namespace {

constexpr int kOldestArchitecture = 80;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string gibibytes(size_t bytes) {
  char text[32];
  snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (size_t{1} << 30));
  return text;
}

struct DeviceMemory {
  size_t free = 0, total = 0;
  size_t reserve() const { return std::min(kCudaRuntimeReserve, total / 32); }
};

DeviceMemory device_memory() {
  DeviceMemory memory;
  check_cuda(cudaMemGetInfo(&memory.free, &memory.total), "asking for the free memory");
  return memory;
}

// Host memory that CUDA did not allocate.
bool is_pageable(const void* memory) {
  cudaPointerAttributes attributes;
  check_cuda(cudaPointerGetAttributes(&attributes, memory), "asking where memory is");
  return attributes.type == cudaMemoryTypeUnregistered;
}

__global__ void increment_kernel(uint32_t* counter) { *counter += 1; }

// Why the device cannot be used, or an empty string.
std::string device_problem(int ordinal) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) return "no NVIDIA driver was found";
    return "the NVIDIA driver supports CUDA " + version_text(driver) + " and is too old for this program, built with " +
           version_text(runtime) + ": update the driver, or build with an older CUDA Toolkit";
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) return "no NVIDIA GPU was found";
  if (status != cudaSuccess) return std::string("CUDA does not start: ") + cudaGetErrorString(status);
  cudaDeviceProp properties;
  const cudaError_t asked = cudaGetDeviceProperties(&properties, ordinal);
  if (asked != cudaSuccess) return std::string("CUDA does not start: ") + cudaGetErrorString(asked);
  const int architecture = 10 * properties.major + properties.minor;
  const std::string device = std::string(properties.name) + " (sm_" + std::to_string(architecture) + ")";
  if (architecture < kOldestArchitecture) {
    return device + " is too old: bf16 on tensor cores needs sm_" + std::to_string(kOldestArchitecture) +
           " (Ampere) or newer";
  }
  cudaSetDevice(ordinal);
  cudaFuncAttributes attributes;
  const cudaError_t probed = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(increment_kernel));
  if (probed == cudaSuccess) return "";
  cudaGetLastError();
  // The first call that needs the device itself: it may also be busy, or its memory full.
  if (probed != cudaErrorInvalidDeviceFunction && probed != cudaErrorNoKernelImageForDevice &&
      probed != cudaErrorUnsupportedPtxVersion) {
    return device + " cannot be used: " + cudaGetErrorString(probed);
  }
  return "this program holds no code for " + device + ": build with CUDA_ARCHS=" + std::to_string(architecture);
}

}  // namespace

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string cuda_device_id(int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    cudaGetLastError();
    return "";
  }
  std::string id;
  for (const char byte : properties.uuid.bytes) {
    char digits[3];
    snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte));
    id += digits;
  }
  return id;
}

std::string cuda_unavailable(int device) { return device_problem(device); }

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  return std::make_unique<CudaBackend>(options);
}

CudaBackend::CudaBackend(const CudaOptions& options) : device_(options.device) {
  const std::string problem = device_problem(device_);
  if (!problem.empty()) throw std::runtime_error(problem);
  check_cuda(cudaSetDevice(device_), "choosing the device");
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device_), "reading the device's properties");
  architecture_ = 10 * properties.major + properties.minor;
  int reaches = 0, shared = 0;
  check_cuda(cudaDeviceGetAttribute(&reaches, cudaDevAttrPageableMemoryAccess, device_),
             "reading the device's properties");
  reaches_pageable_memory_ = reaches != 0;
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_),
             "reading the device's properties");
  multiprocessor_shared_bytes_ = static_cast<size_t>(shared);
  int driver = 0, runtime = 0;
  check_cuda(cudaDriverGetVersion(&driver), "reading the driver's version");
  check_cuda(cudaRuntimeGetVersion(&runtime), "reading the runtime's version");
  description_ = std::string(properties.name) + ", sm_" + std::to_string(architecture_) + ", " +
                 gibibytes(properties.totalGlobalMem) + ", CUDA " + version_text(runtime) + " (driver " +
                 version_text(driver) + ")";
  for (cudaStream_t* stream : {&lanes_[0].stream, &lanes_[1].stream, &copy_streams_[0], &copy_streams_[1]})
    check_cuda(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "creating a stream");
  enter(lanes_[0]);
  matmul_ = std::make_unique<CudaMatmul>(options,
                                         std::string(properties.name) + ", sm_" + std::to_string(architecture_) + ", " +
                                             std::to_string(properties.multiProcessorCount) + " multiprocessors");
}

// Errors are of no use here: either all is well, or one was reported and the device is lost.
CudaBackend::~CudaBackend() {
  const cudaStream_t streams[] = {lanes_[0].stream, lanes_[1].stream, copy_streams_[0], copy_streams_[1]};
  for (cudaStream_t stream : streams) cudaStreamSynchronize(stream);
  for (cudaGraphExec_t graph : graphs_) cudaGraphExecDestroy(graph);
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  for (const auto& block : device_blocks_) cudaFree(block.first);
  for (void* block : pinned_blocks_) cudaFreeHost(block);
  for (const auto& block : pageable_blocks_) std::free(block.first);
  for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
}

std::string CudaBackend::name() const { return "cuda"; }
std::string CudaBackend::description() const { return description_; }

size_t CudaBackend::memory_available() const {
  const DeviceMemory memory = device_memory();
  return memory.free > memory.reserve() ? memory.free - memory.reserve() : 0;
}

// Other processes may use the device, too: more than a context of this one can take is theirs.
size_t CudaBackend::runtime_bytes() const {
  constexpr size_t kLargestContext = size_t{1} << 30;
  const DeviceMemory memory = device_memory();
  const size_t used = memory.total - std::min(memory.total, memory.free + allocated_);
  return std::min(used, kLargestContext) + memory.reserve();
}

size_t CudaBackend::host_memory_available() const { return available_memory(); }
std::string CudaBackend::host_memory_note() const { return host_memory_note_; }

void* CudaBackend::allocate(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, std::max<size_t>(bytes, 1));
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("cannot allocate " + std::to_string(bytes) + " bytes (" + gibibytes(bytes) +
                             ") of GPU memory: " + cudaGetErrorString(status) + "; " + gibibytes(memory_available()) +
                             " are free");
  }
  device_blocks_[memory] = bytes;
  allocated_ += bytes;
  return memory;
}

void CudaBackend::release(void* memory) {
  if (!memory) return;
  const auto block = device_blocks_.find(memory);
  require(block != device_blocks_.end(), "release: not allocated by this backend");
  allocated_ -= block->second;
  device_blocks_.erase(block);
  cudaFree(memory);  // waits for the device; an error of earlier work is reported by the next synchronize()
}

void* CudaBackend::allocate_host(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMallocHost(&memory, std::max<size_t>(bytes, 1));
  if (status == cudaSuccess) {
    pinned_blocks_.insert(memory);
    return memory;
  }
  cudaGetLastError();
  constexpr size_t kPage = 4096;
  const size_t rounded = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  // Linux promises memory it does not have and kills the process later; an error now is kinder.
  if (rounded <= available_memory()) memory = std::aligned_alloc(kPage, rounded);
  if (memory == nullptr) {
    throw std::runtime_error("cannot allocate " + std::to_string(bytes) + " bytes of host memory: " +
                             cudaGetErrorString(status) + "; " + gibibytes(available_memory()) + " are available");
  }
  host_memory_note_ = std::string("pinned host memory was refused (") + cudaGetErrorString(status) +
                      "): pageable memory is used, copies do not overlap with computing";
  pageable_blocks_[static_cast<char*>(memory)] = rounded;
  return memory;
}

void CudaBackend::release_host(void* memory) {
  if (!memory) return;
  if (pinned_blocks_.erase(memory) == 1) {
    cudaFreeHost(memory);
    return;
  }
  require(pageable_blocks_.erase(static_cast<char*>(memory)) == 1, "release_host: not allocated by this backend");
  std::free(memory);
}

bool CudaBackend::in_pageable_block(void* memory) const {
  const auto next = pageable_blocks_.upper_bound(static_cast<char*>(memory));
  if (next == pageable_blocks_.begin()) return false;
  const auto& [begin, bytes] = *std::prev(next);
  return static_cast<char*>(memory) < begin + bytes;
}

size_t CudaBackend::allocated_bytes() const { return allocated_; }

size_t CudaBackend::workspace_bytes(const KernelShapes& shapes) const { return cuda_workspace_bytes(shapes); }

// The counters take the last bytes.
void CudaBackend::set_workspace(void* memory, size_t bytes, Stream stream) {
  Lane& lane = lanes_[stream == Stream::kUpdate ? 1 : 0];
  lane.workspace = memory;
  lane.workspace_bytes = bytes > kArrivalBytes ? (bytes - kArrivalBytes) / kScratchAlignment * kScratchAlignment : 0;
  lane.arrivals = nullptr;
  if (lane.workspace_bytes > 0) {
    lane.arrivals = reinterpret_cast<unsigned*>(static_cast<char*>(memory) + lane.workspace_bytes);
    check_cuda(cudaMemsetAsync(lane.arrivals, 0, kArrivalBytes, lane.stream), "filling memory");
  }
  on(updating_ ? Stream::kUpdate : Stream::kCompute);
}

void CudaBackend::on(Stream stream) {
  updating_ = stream == Stream::kUpdate;
  enter(lanes_[updating_ ? 1 : 0]);
}

void CudaBackend::enter(const Lane& lane) {
  stream_ = lane.stream;
  workspace_ = lane.workspace;
  workspace_bytes_ = lane.workspace_bytes;
  arrivals_ = lane.arrivals;
}

cudaStream_t CudaBackend::stream_of(Stream stream) const {
  switch (stream) {
    case Stream::kCompute: return lanes_[0].stream;
    case Stream::kUpdate: return lanes_[1].stream;
    case Stream::kCopy: return copy_streams_[0];
    case Stream::kCopyBack: return copy_streams_[1];
  }
  throw std::logic_error("no such stream");
}

void* CudaBackend::checked_scratch(size_t bytes) const {
  require(bytes <= workspace_bytes_, "the workspace is too small");
  return workspace_;
}

void CudaBackend::copy(void* destination, const void* source, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  const cudaStream_t queue = stream == Stream::kCompute ? stream_ : stream_of(stream);
  check_cuda(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault, queue), "copying");
  // The driver reads pageable memory, or has written it, before the call returns, because it stages it in pinned memory
  // of its own; not so where the device reaches all of the host's memory.
  if (reaches_pageable_memory_ && (is_pageable(destination) || is_pageable(source)))
    check_cuda(cudaStreamSynchronize(queue), "copying");
}

void CudaBackend::increment(uint32_t* counter) { launch("increment", increment_kernel, {.stream = stream_}, counter); }

void CudaBackend::fill(void* destination, int byte, size_t bytes) {
  if (bytes == 0) return;
  if (in_pageable_block(destination)) {
    check_cuda(cudaStreamSynchronize(stream_), "filling memory");
    std::memset(destination, byte, bytes);
    return;
  }
  check_cuda(cudaMemsetAsync(destination, byte, bytes, stream_), "filling memory");
}

// Of calls that report what an earlier operation did wrong.
void CudaBackend::check_earlier(cudaError_t status, const char* what) const {
  if (status == cudaSuccess) return;
  const std::string where = failed_operation_.empty()
                                ? std::string("noticed while ") + what +
                                      "; with the environment variable CUDA_LAUNCH_BLOCKING=1 and --no-cuda-graph the "
                                      "message names the kernel"
                                : "in " + failed_operation_;
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status) + " (" + where + ")");
}

void CudaBackend::synchronize() { check_earlier(cudaStreamSynchronize(stream_), "waiting for the device"); }

int CudaBackend::create_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
  events_.push_back(event);
  return static_cast<int>(events_.size()) - 1;
}

void CudaBackend::record(int id, Stream stream) {
  check_earlier(cudaEventRecord(event(id), stream_of(stream)), "recording an event");
}

void CudaBackend::wait(int id, Stream stream) {
  check_earlier(cudaStreamWaitEvent(stream_of(stream), event(id), 0), "waiting for an event");
}

void CudaBackend::synchronize_event(int id) { check_earlier(cudaEventSynchronize(event(id)), "waiting for an event"); }

std::string CudaBackend::distrust(const std::string& operation) {
  if (operation == "matmul") return matmul_->distrust();
  const std::pair<const char*, bool*> plain[] = {{"attention_forward", &plain_attention_forward_},
                                                 {"attention_backward", &plain_attention_backward_},
                                                 {"classifier", &plain_classifier_}};
  for (const auto& [name, is_on] : plain)
    if (operation == name && !std::exchange(*is_on, true)) return "the plain kernels";
  return "";
}

bool CudaBackend::can_capture() const { return true; }

void CudaBackend::begin_capture() {
  check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "beginning to record a graph");
}

int CudaBackend::end_capture() {
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamEndCapture(stream_, &graph), "recording a graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(status, "instantiating a graph");
  graphs_.push_back(executable);
  return static_cast<int>(graphs_.size()) - 1;
}

void CudaBackend::abandon_capture() {
  cudaGraph_t graph = nullptr;
  if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess) cudaGraphDestroy(graph);
  cudaGetLastError();
}

void CudaBackend::replay(int graph) {
  check_cuda(cudaGraphLaunch(graphs_.at(static_cast<size_t>(graph)), stream_), "replaying a graph");
}

CudaBackend::Timed::Timed(CudaBackend& backend, const char* operation, double flops, double bytes)
    : backend_(backend), operation_(operation), idle_(backend), scope_(backend.profiler, operation, flops, bytes) {}

CudaBackend::Timed::Idle::Idle(CudaBackend& backend) {
  if (backend.profiler) backend.synchronize();
}

// A destructor must not throw: the operation's name is kept for the next synchronize(), which does.
CudaBackend::Timed::~Timed() {
  if (backend_.profiler && cudaStreamSynchronize(backend_.stream_) != cudaSuccess &&
      backend_.failed_operation_.empty()) {
    backend_.failed_operation_ = operation_;
  }
}
