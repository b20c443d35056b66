// metrics.cpp: see metrics.h.
#include "train/metrics.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "data/json_text.h"
#include "train/file_io.h"

namespace {

// JSON has no infinity and no NaN.
nlohmann::ordered_json number(double value) {
  if (std::isfinite(value)) return value;
  return nullptr;
}

// Columns of the terminal, or a number that cuts nothing.
size_t terminal_columns() {
  winsize size{};
  return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col : 1000;
}

std::string path_of(const std::string& run) { return run + "/metrics.jsonl"; }

// The header, if any, and the whole lines of steps up to the last that a resumed run keeps.
struct KeptLines {
  std::string header, steps;
};

KeptLines lines_until(const std::string& path, uint32_t last_step) {
  KeptLines kept;
  if (!std::filesystem::exists(path)) return kept;
  std::istringstream file(read_file(path));
  for (std::string line; std::getline(file, line);) {
    nlohmann::json json;
    try {
      json = parse_json(line, path);
    } catch (const std::runtime_error&) {
      continue;  // cut off
    }
    if (!json.is_object()) continue;
    const auto step = json.find("step");
    if (step == json.end()) kept.header += line + "\n";
    if (step != json.end() && step->is_number_unsigned() && *step <= last_step) kept.steps += line + "\n";
  }
  return kept;
}

}  // namespace

bool goes_on_from(const std::string& run, const std::string& other, uint32_t last_step) {
  const std::string steps = lines_until(path_of(run), last_step).steps;
  return steps.empty() || steps == lines_until(path_of(other), last_step).steps;
}

MetricsFile::MetricsFile(const std::string& run, const nlohmann::ordered_json& header,
                         std::optional<uint32_t> resumed_step, const std::string& resumed_run)
    : path_(path_of(run)), file_(nullptr, std::fclose) {
  KeptLines kept;
  if (resumed_step) {
    kept = lines_until(path_, *resumed_step);
    if (kept.steps.empty()) kept = {"", lines_until(path_of(resumed_run), *resumed_step).steps};
  }
  if (kept.header.empty()) kept.header = header.dump() + "\n";
  const std::string temporary = run + "/.tmp-metrics.jsonl";  // what clean_run() removes
  write_file(temporary, kept.header + kept.steps);
  std::filesystem::rename(temporary, path_);
  file_.reset(std::fopen(path_.c_str(), "a"));
  if (!file_) throw std::runtime_error(path_ + ": cannot be written: " + std::strerror(errno));
}

void MetricsFile::write_line(const std::string& line) {
  if (std::fprintf(file_.get(), "%s\n", line.c_str()) < 0 || std::fflush(file_.get()) != 0) {
    throw std::runtime_error(path_ + ": cannot be written: " + std::strerror(errno));
  }
}

void MetricsFile::write(const StepMetrics& m) {
  nlohmann::ordered_json json = {{"step", m.step},
                                 {"tokens", m.tokens},
                                 {"loss", number(m.loss)},
                                 {"lr", m.lr},
                                 {"grad_norm", number(m.grad_norm)},
                                 {"step_ms", m.step_ms},
                                 {"tokens_per_second", m.tokens_per_second},
                                 {"mfu", m.mfu},
                                 {"device_bytes", m.device_bytes}};
  if (m.skipped > 0) json["skipped"] = m.skipped;
  if (m.val_loss) json["val_loss"] = number(*m.val_loss);
  if (m.val_bits_per_byte) json["val_bits_per_byte"] = number(*m.val_bits_per_byte);
  write_line(json.dump());
}

void MetricsFile::write_sample(uint32_t step, const std::string& text) {
  const nlohmann::ordered_json json = {{"step", step}, {"sample", text}};
  write_line(json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

Progress::Progress(int64_t total_steps, int rank, int ranks)
    : total_steps_(total_steps), ranks_(ranks), silent_(rank > 0), terminal_(isatty(STDOUT_FILENO)) {}

void Progress::step(const StepMetrics& m, double seconds_left) {
  if (silent_) return;
  char line[256], ranks[32] = "";
  if (ranks_ > 1) snprintf(ranks, sizeof ranks, " | %d ranks", ranks_);
  // What a narrow terminal cuts off comes last.
  snprintf(line, sizeof line,
           "step %u/%lld | loss %.4f | ETA %s | %.0f tokens/s | %.0f ms | MFU %.1f%% | lr %.2e | grad norm %.3f%s",
           m.step, static_cast<long long>(total_steps_), m.loss, format_duration(seconds_left).c_str(),
           m.tokens_per_second, m.step_ms, 100 * m.mfu, m.lr, m.grad_norm, ranks);
  if (terminal_) {
    // A line that wraps could not be rewritten in place.
    std::printf("\r\033[K%s", std::string(line).substr(0, terminal_columns() - 1).c_str());
  } else {
    std::puts(line);
  }
  std::fflush(stdout);
  open_line_ = terminal_;
}

void Progress::message(const std::string& text) {
  if (silent_) return;
  finish();
  std::printf("%s\n", text.c_str());
  std::fflush(stdout);
}

void Progress::finish() {
  if (open_line_) std::printf("\n");
  open_line_ = false;
}

std::string format_duration(double seconds) {
  const long long s = std::llround(std::max(0.0, seconds));
  char text[64];
  if (s >= 3600) {
    snprintf(text, sizeof text, "%lldh%02lldm", s / 3600, s / 60 % 60);
  } else {
    snprintf(text, sizeof text, "%lldm%02llds", s / 60, s % 60);
  }
  return text;
}

std::string format_bytes(size_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  char text[64];
  snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
  return text;
}

std::string profile_table(const Profiler& profiler, double total_seconds) {
  std::vector<std::pair<std::string, Profiler::Entry>> rows(profiler.entries().begin(), profiler.entries().end());
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  std::string text = "operation                     calls      time   share    GFLOP/s     GB/s\n";
  double listed = 0;
  char line[160];
  for (const auto& [name, entry] : rows) {
    listed += entry.seconds;
    snprintf(line, sizeof line, "%-26s %8lld %8.3fs  %5.1f%% %10.1f %8.1f\n", name.c_str(),
             static_cast<long long>(entry.calls), entry.seconds, 100 * entry.seconds / total_seconds,
             entry.flops / entry.seconds / 1e9, entry.bytes / entry.seconds / 1e9);
    text += line;
  }
  snprintf(line, sizeof line, "%-26s %8s %8.3fs  %5.1f%%\n", "everything else", "",
           std::max(0.0, total_seconds - listed), 100 * std::max(0.0, 1 - listed / total_seconds));
  return text + line;
}
