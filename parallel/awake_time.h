// awake_time.h: time as this process lives it.
#pragma once

#include <algorithm>
#include <chrono>

// Seconds since the start in which this process could have run: of a gap between two looks at the clock only the first
// second counts. A job that is stopped as a whole (Ctrl-Z, a machine that sleeps) finds nobody missing when it goes on.
class AwakeTime {
 public:
  // To be called at least every `kTick` seconds.
  double now() {
    const auto clock = std::chrono::steady_clock::now();
    seconds_ += std::min(std::chrono::duration<double>(clock - last_).count(), kLongestGap);
    last_ = clock;
    return seconds_;
  }
  static constexpr double kTick = 0.25;

 private:
  static constexpr double kLongestGap = 1;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  double seconds_ = 0;
};
