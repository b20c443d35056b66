// fastest_way.cu: timing by events, in rounds over all ways, so that a device that changes its clock is fair to them.
#include "kernels/cuda/fastest_way.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/launch.cuh"

namespace {

constexpr int kRounds = 4;               // the first only warms up
constexpr float kClearlyFaster = 0.98f;  // of the time of the first way

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "creating an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check_cuda(cudaEventRecord(event_, stream), "recording an event"); }

  // Waits for this event; the time since an earlier one.
  float milliseconds_since(const Event& start) const {
    check_cuda(cudaEventSynchronize(event_), "timing a matrix product");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, start.event_, event_), "timing a matrix product");
    return milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

// All are enqueued before the host waits, behind an untimed one, so that the device always has work and what is
// measured is not the host.
std::vector<float> shortest_times(const Ways& ways, cudaStream_t stream) {
  std::vector<float> times(ways.size(), INFINITY);
  std::vector<bool> works(ways.size(), true);
  std::vector<Event> events(ways.size() + 1);
  for (int round = 0; round < kRounds; ++round) {
    ways[0]();
    events[0].record(stream);
    for (size_t i = 0; i < ways.size(); ++i) {
      works[i] = works[i] && ways[i]();
      events[i + 1].record(stream);
    }
    for (size_t i = 0; i < ways.size(); ++i) {
      const float time = events[i + 1].milliseconds_since(events[i]);
      if (works[i] && round > 0) times[i] = std::min(times[i], time);
    }
  }
  return times;
}

size_t fastest(const Ways& ways, cudaStream_t stream) {
  const std::vector<float> times = shortest_times(ways, stream);
  const size_t best = static_cast<size_t>(std::min_element(times.begin(), times.end()) - times.begin());
  return times[best] < kClearlyFaster * times[0] ? best : 0;
}
