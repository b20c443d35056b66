// queue.h: the insides of streams, events and captures; for stream.cpp, graph.cpp, copy.cpp.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/cuda_on_cpu/runtime.h"

namespace cuda_on_cpu {

// One cudaEventRecord: done when the work enqueued on the stream before it is.
struct Record {
  explicit Record(Stream* on) : stream(on) {}
  Stream* stream;  // that has to advance for this to happen
  std::atomic<bool> done = false;
  double seconds = 0;  // when
};

struct Operation {
  std::string name;
  std::function<void()> work;      // or
  std::shared_ptr<Record> record;  // to be marked as done, or
  std::shared_ptr<Record> wait;    // to wait for
  // The buffers that the work is about, by an address in each; none: it may be about any.
  std::vector<const void*> buffers = {};
};

struct Graph {
  struct Node {
    Operation operation;
    std::vector<size_t> after;
  };
  std::vector<Node> nodes;
};

struct ExecutableGraph {
  Graph graph;
};

struct Capture {
  Stream* origin;
  cudaStreamCaptureMode mode;
  bool invalid = false, finished = false;
  Graph graph;
};

struct Stream {
  std::deque<Operation> queue;
  std::shared_ptr<Capture> capture;  // while it is being captured
  std::vector<size_t> last_nodes;    // that the next captured operation comes after
};

struct Event {
  bool timing;
  std::shared_ptr<Record> latest;
  std::shared_ptr<Capture> capture;  // when last recorded in a captured stream
  std::vector<size_t> nodes;
};

// The stream itself, or the one that null stands for. Null when there is no such stream.
Stream* find_stream(cudaStream_t stream);

// Puts an operation with work to do at the end of a stream, or of the graph that it is captured into.
cudaError_t enqueue(cudaStream_t stream, Operation operation);

// Puts any operation at the end of a stream that is not being captured.
void append(Stream& stream, Operation operation);

// Runs a stream until it is empty, and of the others what it needs or what chance decides.
void drain(Stream& stream);
void drain_all();

// The error for doing something to this stream that a capture does not permit, which also ends the capture.
cudaError_t refuse_in_capture(Stream& stream);

// The same for calls that concern no stream and that no capture permits, except in relaxed mode.
cudaError_t forbid_during_capture();

// All streams of the capture are ordinary streams again.
void leave_capture(const std::shared_ptr<Capture>& capture);

}  // namespace cuda_on_cpu
