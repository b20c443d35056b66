// profile_report.cpp: the profiler's entries as a table, most expensive first.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "train/trainer.h"

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
