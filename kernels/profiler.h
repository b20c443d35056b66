// profiler.h: time, FLOPs and bytes by operation, for --profile. Costs two clock reads per operation when on, nothing
// when off.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>

class Profiler {
 public:
  struct Entry {
    int64_t calls = 0;
    double seconds = 0, flops = 0, bytes = 0;
  };

  // Times one operation from construction to destruction. `bytes` are those that must move, `flops` those that must be
  // done.
  class Scope {
   public:
    Scope(Profiler* profiler, const char* operation, double flops, double bytes)
        : profiler_(profiler), operation_(operation), flops_(flops), bytes_(bytes) {
      if (profiler_) start_ = std::chrono::steady_clock::now();
    }
    ~Scope() {
      if (!profiler_) return;
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
      Entry& entry = profiler_->entries_[operation_];
      ++entry.calls;
      entry.seconds += elapsed.count();
      entry.flops += flops_;
      entry.bytes += bytes_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Profiler* profiler_;
    const char* operation_;
    double flops_, bytes_;
    std::chrono::steady_clock::time_point start_;
  };

  const std::map<std::string, Entry>& entries() const { return entries_; }

 private:
  std::map<std::string, Entry> entries_;
};
