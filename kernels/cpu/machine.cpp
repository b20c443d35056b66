// machine.cpp: reads /proc and the control group file system (version 2, or version 1 where its files exist). A file
// that is missing sets no limit.
#include "kernels/cpu/machine.h"

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace {

const std::string kControlGroups = "/sys/fs/cgroup";

// The number a file starts with; `otherwise` when there is none ("max", or no such file).
double number_in(const std::string& path, double otherwise) {
  std::ifstream file(path);
  double value;
  return file >> value ? value : otherwise;
}

// The number after `key` in a file of lines "key number".
double number_after(const std::string& path, const std::string& key, double otherwise) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word;
    double value;
    if (words >> word >> value && word == key) return value;
  }
  return otherwise;
}

// Directories of this process's control group and its ancestors (version 2); limits of each apply.
std::vector<std::string> control_groups() {
  std::vector<std::string> directories = {kControlGroups};
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 3, "0::") != 0) continue;
    const std::string path = line.substr(3);
    for (size_t end = path.find('/', 1); path.size() > 1; end = path.find('/', end + 1)) {
      directories.push_back(kControlGroups + path.substr(0, end));
      if (end == std::string::npos) break;
    }
  }
  return directories;
}

}  // namespace

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.compare(0, 10, "model name") == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

int usable_cores() {
  if (std::getenv("OMP_NUM_THREADS")) return std::max(1, omp_get_max_threads());  // libgomp has read it
  double cores = omp_get_num_procs();
  for (const std::string& group : control_groups()) {
    std::ifstream file(group + "/cpu.max");
    double quota, period;
    if (file >> quota >> period && period > 0) cores = std::min(cores, quota / period);
  }
  const double quota = number_in(kControlGroups + "/cpu/cpu.cfs_quota_us", -1);
  const double period = number_in(kControlGroups + "/cpu/cpu.cfs_period_us", 0);
  if (quota > 0 && period > 0) cores = std::min(cores, quota / period);
  return std::max(1, static_cast<int>(cores + 0.5));
}

size_t available_memory() {
  const double unlimited = static_cast<double>(std::numeric_limits<int64_t>::max());
  double available = number_after("/proc/meminfo", "MemAvailable:", unlimited / 1024) * 1024;
  if (available >= unlimited) available = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  // The page cache counts as used but is given back on demand.
  for (const std::string& group : control_groups()) {
    const double limit = number_in(group + "/memory.max", unlimited);
    const double used = number_in(group + "/memory.current", 0);
    const double cache = number_after(group + "/memory.stat", "inactive_file", 0);
    available = std::min(available, limit - used + cache);
  }
  const std::string v1 = kControlGroups + "/memory/memory.";
  available = std::min(available, number_in(v1 + "limit_in_bytes", unlimited) - number_in(v1 + "usage_in_bytes", 0) +
                                      number_after(v1 + "stat", "total_inactive_file", 0));
  return static_cast<size_t>(std::max(available, 0.0));
}

size_t resident_memory() { return static_cast<size_t>(number_after("/proc/self/status", "VmRSS:", 0) * 1024); }

size_t resident_bytes(const void* memory, size_t bytes) {
  if (bytes == 0) return 0;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes, first = begin / page * page;
  std::vector<unsigned char> resident((end - first + page - 1) / page);
  if (mincore(reinterpret_cast<void*>(first), end - first, resident.data()) != 0) return 0;
  size_t total = 0;
  for (size_t i = 0; i < resident.size(); ++i) {
    const uintptr_t from = std::max(begin, first + i * page), to = std::min(end, first + (i + 1) * page);
    if (resident[i] & 1) total += to - from;
  }
  return total;
}
