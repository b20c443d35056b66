// stream.cpp: streams, events and graphs of the CUDA runtime in front of the interpreter. Everything happens at once,
// in the order in which the host asks for it, which is one of the orders that streams allow.
#include "tests/ptx/stream.h"

#include <chrono>
#include <memory>
#include <set>
#include <utility>
#include <vector>

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
struct CUstream_st {
  CUgraph_st* capture = nullptr;
  bool began_capture = false;  // it, and not one that joined
};
struct CUevent_st {
  CUgraph_st* capture = nullptr;
  bool timed = true, recorded = false;
  std::chrono::steady_clock::time_point time;
};

namespace {

cudaError_t kernel_error = cudaSuccess;
thread_local cudaError_t last_error = cudaSuccess;

// Used by static objects' destructors, too.
std::set<CUstream_st*>& streams() {
  static auto* const all = new std::set<CUstream_st*>;
  return *all;
}

CUstream_st* of(cudaStream_t stream) {
  static CUstream_st default_stream;
  return stream ? stream : &default_stream;
}

}  // namespace

std::unique_lock<std::recursive_mutex> lock_device() {
  static auto* const mutex = new std::recursive_mutex;  // used by static objects' destructors, too
  return std::unique_lock(*mutex);
}

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
void set_kernel_error(cudaError_t error) { kernel_error = error; }
cudaError_t wait_for_device() {
  const auto lock = lock_device();
  return returned(std::exchange(kernel_error, cudaSuccess));
}

cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  const auto lock = lock_device();
  CUgraph_st* const capture = of(stream)->capture;
  if (capture)
    capture->work.push_back(std::move(work));
  else
    work();
  return cudaSuccess;
}

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaDeviceSynchronize() { return wait_for_device(); }

// ---- streams

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const auto lock = lock_device();
  *stream = new CUstream_st;
  streams().insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const auto lock = lock_device();
  streams().erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (of(stream)->capture) return returned(cudaErrorStreamCaptureUnsupported);
  return wait_for_device();
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = of(stream)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new CUevent_st;
  (*event)->timed = !(flags & cudaEventDisableTiming);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->capture = of(stream)->capture;
  event->recorded = true;
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (event->capture && !of(stream)->capture) of(stream)->capture = event->capture;  // joins the recording
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->capture) return returned(cudaErrorStreamCaptureUnsupported);
  return wait_for_device();
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  if (!begin->timed || !end->timed || !begin->recorded || !end->recorded)
    return returned(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return cudaSuccess;
}

// ---- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || stream->capture) return returned(cudaErrorStreamCaptureUnsupported);
  stream->capture = new CUgraph_st;
  stream->began_capture = true;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!stream->capture || !stream->began_capture) return returned(cudaErrorStreamCaptureUnsupported);
  const auto lock = lock_device();
  *graph = stream->capture;
  for (CUstream_st* const other : streams()) {
    if (other->capture == *graph) other->capture = nullptr;
  }
  stream->began_capture = false;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return enqueue(stream, [executable] {
    for (const auto& work : executable->work) work();
  });
}
}
