// stream.cpp: streams and events, see stream.h. What runs when: mostly nothing until the host waits for a stream or an
// event, sometimes all of a stream at once. Then a policy drawn for this wait decides about the other streams. Either
// they run only as far as they are needed, or as far as they can, or any stream takes any turn. All of it is what a GPU
// may do.
#include "tests/cuda_on_cpu/stream.h"

#include <algorithm>
#include <chrono>
#include <set>

#include "tests/cuda_on_cpu/queue.h"
#include "tests/cuda_on_cpu/report.h"

namespace cuda_on_cpu {

namespace {

// A real queue is bounded, too; and captured arguments and staged copies take memory.
constexpr size_t kMostOperations = 1000;

Stream null_stream;
std::set<Stream*>& streams() {
  static std::set<Stream*> all = {&null_stream};
  return all;
}
std::set<Event*> events;
std::mutex latest_mutex;  // of Event::latest, beside the one of the interface

Random& order() {
  static Random random(seed());
  return random;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool can_run(const Stream& stream) {
  return !stream.queue.empty() && (stream.queue.front().wait == nullptr || stream.queue.front().wait->done);
}

void run_head(Stream& stream) {
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  // After an error the device does nothing more.
  if (operation.work && !has_sticky_error()) {
    show_device_memory(operation.buffers);
    operation.work();
  }
  if (operation.record) {
    operation.record->done = true;
    operation.record->seconds = now();
  }
}

// Runs one operation that brings the stream nearer to its end.
void advance(Stream& stream) {
  Stream* next = &stream;
  while (!can_run(*next)) next = next->queue.front().wait->stream;
  run_head(*next);
}

Stream* any_that_can_run(const Stream* except) {
  std::vector<Stream*> candidates;
  for (Stream* stream : streams()) {
    if (stream != except && can_run(*stream)) candidates.push_back(stream);
  }
  return candidates.empty() ? nullptr : candidates[order().below(static_cast<uint32_t>(candidates.size()))];
}

template <typename Condition>
void run_until(Stream& target, Condition done) {
  if (done()) return;
  const DeviceMemoryAccess access;
  enum { kLazy, kEager, kAny };
  const uint32_t policy = order().below(3);
  while (!done()) {
    if (policy == kEager) {
      while (Stream* other = any_that_can_run(&target)) run_head(*other);
      advance(target);
    } else if (policy == kAny) {
      run_head(*any_that_can_run(nullptr));
    } else {
      advance(target);
    }
  }
}

}  // namespace

Stream* find_stream(cudaStream_t stream) {
  if (stream == nullptr) return &null_stream;
  return streams().contains(stream) ? stream : nullptr;
}

void drain(Stream& stream) {
  run_until(stream, [&] { return stream.queue.empty(); });
}

void drain_all() {
  for (Stream* stream : streams()) drain(*stream);
}

void append(Stream& stream, Operation operation) {
  stream.queue.push_back(std::move(operation));
  if (stream.queue.size() > kMostOperations) {
    const DeviceMemoryAccess access;
    while (stream.queue.size() > kMostOperations / 2) advance(stream);
  }
  // Usually the device lags behind as far as it can. Sometimes it is fast.
  if (order().below(8) == 0) drain(stream);
}

namespace {
std::map<std::string, uint64_t>& launch_counts() {
  static std::map<std::string, uint64_t> counts;
  return counts;
}
}  // namespace

const std::map<std::string, uint64_t>& launches() { return launch_counts(); }

cudaError_t enqueue(cudaStream_t handle, std::string name, std::function<void()> work) {
  {
    const std::lock_guard lock(api_mutex());
    ++launch_counts()[name];
  }
  return enqueue(handle, Operation{std::move(name), std::move(work), {}, {}});
}

cudaError_t enqueue(cudaStream_t handle, Operation operation) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return finish(cudaErrorInvalidResourceHandle);
  if (stream->capture == nullptr) {
    append(*stream, std::move(operation));
    return cudaSuccess;  // even if it has run already and failed: that is reported later
  }
  if (stream->capture->invalid) return finish(cudaErrorStreamCaptureInvalidated);
  auto& nodes = stream->capture->graph.nodes;
  nodes.push_back({std::move(operation), stream->last_nodes});
  stream->last_nodes.assign(1, nodes.size() - 1);
  return finish(cudaSuccess);
}

cudaError_t refuse_in_capture(Stream& stream) {
  if (stream.capture == nullptr) return cudaSuccess;
  stream.capture->invalid = true;
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t forbid_during_capture() {
  for (Stream* stream : streams()) {
    if (stream->capture != nullptr && stream->capture->mode != cudaStreamCaptureModeRelaxed) {
      return refuse_in_capture(*stream);
    }
  }
  return cudaSuccess;
}

void leave_capture(const std::shared_ptr<Capture>& capture) {
  capture->finished = true;
  for (Stream* stream : streams()) {
    if (stream->capture != capture) continue;
    stream->capture = nullptr;
    stream->last_nodes.clear();
  }
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const std::lock_guard lock(api_mutex());
  *stream = nullptr;
  if (device_status() != cudaSuccess) return finish(device_status());
  if (flags != cudaStreamNonBlocking) return finish(cudaErrorNotSupported);
  *stream = new Stream;
  streams().insert(*stream);
  return finish(cudaSuccess);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock(api_mutex());
  if (stream == nullptr || !streams().contains(stream)) return finish(cudaErrorInvalidResourceHandle);
  drain(*stream);
  streams().erase(stream);
  delete stream;
  return finish(device_status());
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return finish(cudaErrorInvalidResourceHandle);
  if (const cudaError_t status = refuse_in_capture(*stream); status != cudaSuccess) return finish(status);
  drain(*stream);
  return finish(cudaSuccess);
}

cudaError_t cudaDeviceSynchronize() {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  for (Stream* stream : streams()) {
    if (const cudaError_t status = refuse_in_capture(*stream); status != cudaSuccess) return finish(status);
  }
  drain_all();
  return finish(cudaSuccess);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const std::lock_guard lock(api_mutex());
  *event = nullptr;
  if (device_status() != cudaSuccess) return finish(device_status());
  *event = new Event{(flags & cudaEventDisableTiming) == 0, nullptr, nullptr, {}};
  events.insert(*event);
  return finish(cudaSuccess);
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard lock(api_mutex());
  if (events.erase(event) == 0) return finish(cudaErrorInvalidResourceHandle);
  delete event;
  return finish(device_status());
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  Stream* stream = find_stream(handle);
  if (stream == nullptr || !events.contains(event)) return finish(cudaErrorInvalidResourceHandle);
  event->capture = stream->capture;
  event->nodes = stream->last_nodes;
  if (stream->capture != nullptr) return finish(cudaSuccess);
  {
    const std::lock_guard latest_lock(latest_mutex);
    event->latest = std::make_shared<Record>(stream);
  }
  append(*stream, {"event", {}, event->latest, {}});
  return finish(cudaSuccess);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  Stream* stream = find_stream(handle);
  if (stream == nullptr || !events.contains(event)) return finish(cudaErrorInvalidResourceHandle);
  if (event->capture != nullptr) {
    if (event->capture->finished) return finish(cudaErrorCapturedEvent);
    // The stream joins the capture that the event was recorded in.
    if (stream->capture != nullptr && stream->capture != event->capture) return finish(cudaErrorStreamCaptureIsolation);
    stream->capture = event->capture;
    for (size_t node : event->nodes) {
      if (std::ranges::find(stream->last_nodes, node) == stream->last_nodes.end()) stream->last_nodes.push_back(node);
    }
    return finish(cudaSuccess);
  }
  if (stream->capture != nullptr && event->latest != nullptr) {
    stream->capture->invalid = true;
    return finish(cudaErrorStreamCaptureIsolation);
  }
  if (event->latest != nullptr) append(*stream, {"wait for event", {}, {}, event->latest});
  return finish(cudaSuccess);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  if (!events.contains(event)) return finish(cudaErrorInvalidResourceHandle);
  if (event->capture != nullptr) return finish(cudaErrorCapturedEvent);
  const std::shared_ptr<Record> record = event->latest;
  if (record != nullptr && !record->done) run_until(*record->stream, [&] { return record->done.load(); });
  return finish(cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  // A question waits for nobody: not for another thread under whose hands the device works, either.
  const std::unique_lock lock(api_mutex(), std::try_to_lock);
  if (!lock) {
    const std::lock_guard latest_lock(latest_mutex);
    return event->latest == nullptr || event->latest->done ? cudaSuccess : cudaErrorNotReady;
  }
  if (device_status() != cudaSuccess) return finish(device_status());
  if (!events.contains(event)) return finish(cudaErrorInvalidResourceHandle);
  if (event->capture != nullptr) return finish(cudaErrorCapturedEvent);
  if (event->latest == nullptr || event->latest->done) return finish(cudaSuccess);
  const DeviceMemoryAccess access;
  advance(*event->latest->stream);
  return finish(cudaErrorNotReady);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  for (Event* event : {start, end}) {
    if (!events.contains(event) || !event->timing || event->latest == nullptr) {
      return finish(cudaErrorInvalidResourceHandle);
    }
    if (!event->latest->done) return finish(cudaErrorNotReady);
  }
  *milliseconds = static_cast<float>((end->latest->seconds - start->latest->seconds) * 1000);
  return finish(cudaSuccess);
}
