// graph_cache.h: a step as CUDA graphs. A sequence of operations that is the same every time it is run under one key is
// issued as it comes the first time (kernels are loaded and matmuls tuned), recorded the second time, and from then on
// replayed at the cost of one call. What changes from run to run must be in device memory (StepScalars), and what the
// sequence does to host state must be the same each time, because a replay does not do it.
#pragma once

#include <cstdint>
#include <map>

#include "kernels/backend.h"

// Records what `operations` issue, which does not run; returns the graph for Backend::replay().
template <typename Operations>
int record_graph(Backend& backend, Operations&& operations) {
  backend.begin_capture();
  try {
    operations();
  } catch (...) {
    backend.abandon_capture();
    throw;
  }
  return backend.end_capture();
}

class GraphCache {
 public:
  // Without `enabled`, or on a backend that cannot capture, operations are always issued as they come.
  GraphCache(Backend& backend, bool enabled) : backend_(backend), enabled_(enabled && backend.can_capture()) {}

  template <typename Operations>
  void run(uint32_t key, Operations&& operations) {
    if (!enabled_ || backend_.profiler) {
      operations();
      return;
    }
    const auto [entry, first] = graphs_.emplace(key, kNotRecorded);
    if (first) {
      operations();
      return;
    }
    if (entry->second == kNotRecorded) entry->second = record_graph(backend_, operations);
    backend_.replay(entry->second);
  }

 private:
  static constexpr int kNotRecorded = -1;

  Backend& backend_;
  bool enabled_;
  std::map<uint32_t, int> graphs_;
};
