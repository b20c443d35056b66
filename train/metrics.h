// metrics.h: what a run tells the world: metrics.jsonl (one JSON object per line) and the progress line on the
// terminal.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "kernels/profiler.h"

struct StepMetrics {
  uint32_t step = 0;
  int64_t tokens = 0;  // seen since the start of the run
  double loss = 0, lr = 0, grad_norm = 0, step_ms = 0, tokens_per_second = 0, mfu = 0;
  size_t device_bytes = 0;
  int64_t skipped = 0;
  std::optional<double> val_loss, val_bits_per_byte;
};

// Appends to `run`/metrics.jsonl; every line is flushed. Throws std::runtime_error when it cannot be written.
class MetricsFile {
 public:
  // A new file begins with `header`. A run that goes on from `resumed_step` of `resumed_run` keeps its own file without
  // the lines of later steps; in a new directory the lines up to that step come from the other run's file, if any.
  MetricsFile(const std::string& run, const nlohmann::ordered_json& header, std::optional<uint32_t> resumed_step,
              const std::string& resumed_run);
  void write(const StepMetrics& metrics);
  void write_sample(uint32_t step, const std::string& text);  // a line of its own

 private:
  void write_line(const std::string& line);
  std::string path_;
  std::unique_ptr<FILE, int (*)(FILE*)> file_;
};

// Whether the lines of a run up to a step, if it has any, are those of the other: whether it began as that one did.
bool goes_on_from(const std::string& run, const std::string& other, uint32_t last_step);

// The live line: rewritten in place on a terminal, one line per call elsewhere.
class Progress {
 public:
  // Several ranks: only the first one says anything; the line then names their number.
  Progress(int64_t total_steps, int rank, int ranks);
  void step(const StepMetrics& metrics, double seconds_left);
  void message(const std::string& text);  // a line that stays
  void finish();                          // leaves the live line as it is

 private:
  int64_t total_steps_;
  int ranks_;
  bool silent_, terminal_;
  bool open_line_ = false;
};

std::string format_duration(double seconds);
std::string format_bytes(size_t bytes);  // "1.50 GiB"

// Time, rate and share of every operation that the profiler timed, most expensive first.
std::string profile_table(const Profiler& profiler, double total_seconds);
