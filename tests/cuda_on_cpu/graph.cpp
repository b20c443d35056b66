// graph.cpp: a stream is captured into a graph instead of being filled; launching the graph enqueues its operations, in
// one of the orders that its dependencies permit.
#include <algorithm>

#include "tests/cuda_on_cpu/queue.h"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/stream.h"

using namespace cuda_on_cpu;

namespace {

// Every node must come before the end of the origin stream, or else other streams were not joined to it again.
bool is_joined(const Graph& graph, const std::vector<size_t>& last) {
  std::vector<bool> reached(graph.nodes.size());
  std::vector<size_t> open = last;
  while (!open.empty()) {
    const size_t node = open.back();
    open.pop_back();
    if (reached[node]) continue;
    reached[node] = true;
    open.insert(open.end(), graph.nodes[node].after.begin(), graph.nodes[node].after.end());
  }
  return std::ranges::find(reached, false) == reached.end();
}

}  // namespace

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return finish(cudaErrorInvalidResourceHandle);
  if (handle == nullptr || stream->capture != nullptr) return finish(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Capture>(Capture{stream, mode, false, false, {}});
  stream->last_nodes.clear();
  return finish(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const std::lock_guard lock(api_mutex());
  *graph = nullptr;
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return finish(cudaErrorInvalidResourceHandle);
  if (stream->capture == nullptr || stream->capture->origin != stream) return finish(cudaErrorStreamCaptureUnmatched);
  const std::shared_ptr<Capture> capture = stream->capture;
  const std::vector<size_t> last = stream->last_nodes;
  leave_capture(capture);
  if (capture->invalid) return finish(cudaErrorStreamCaptureInvalidated);
  if (!is_joined(capture->graph, last)) return finish(cudaErrorStreamCaptureUnjoined);
  *graph = new Graph(capture->graph);
  return finish(device_status());
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const std::lock_guard lock(api_mutex());
  const Stream* stream = find_stream(handle);
  if (stream == nullptr) return finish(cudaErrorInvalidResourceHandle);
  *status = cudaStreamCaptureStatusNone;
  if (stream->capture != nullptr) {
    *status = stream->capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  }
  return finish(device_status());
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  const std::lock_guard lock(api_mutex());
  *executable = nullptr;
  if (device_status() != cudaSuccess) return finish(device_status());
  if (graph == nullptr) return finish(cudaErrorInvalidValue);
  *executable = new ExecutableGraph{*graph};
  return finish(cudaSuccess);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return finish(cudaErrorInvalidResourceHandle);
  if (executable == nullptr) return finish(cudaErrorInvalidValue);
  if (const cudaError_t status = refuse_in_capture(*stream); status != cudaSuccess) return finish(status);
  static Random random(seed());
  const auto& nodes = executable->graph.nodes;
  std::vector<size_t> missing(nodes.size());
  std::vector<std::vector<size_t>> before(nodes.size());
  std::vector<size_t> ready;
  for (size_t i = 0; i < nodes.size(); ++i) {
    missing[i] = nodes[i].after.size();
    for (size_t earlier : nodes[i].after) before[earlier].push_back(i);
    if (missing[i] == 0) ready.push_back(i);
  }
  while (!ready.empty()) {
    std::swap(ready[random.below(static_cast<uint32_t>(ready.size()))], ready.back());
    const size_t node = ready.back();
    ready.pop_back();
    append(*stream, nodes[node].operation);
    for (size_t later : before[node]) {
      if (--missing[later] == 0) ready.push_back(later);
    }
  }
  return finish(cudaSuccess);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const std::lock_guard lock(api_mutex());
  delete graph;
  return finish(device_status());
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const std::lock_guard lock(api_mutex());
  delete executable;
  return finish(device_status());
}
