// machine.cpp: reads /proc and the control group file system (version 2, or version 1 where its files exist). A file
// that is missing sets no limit.
#include "kernels/cpu/machine.h"

#include <omp.h>
#include <sys/mman.h>
#include <sys/resource.h>
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

// Directories of this process's control group and its ancestors; limits of each apply. Of version 2, which has one
// hierarchy, with an empty controller; else of that controller's version 1. In a container the path may be the host's:
// then only those that can be seen here count.
std::vector<std::string> control_groups(const std::string& root, const std::string& controller) {
  const std::string mount = root + "/sys/fs/cgroup" + (controller.empty() ? "" : "/" + controller);
  std::vector<std::string> directories = {mount};
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // number:controller,controller:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool wanted = controller.empty() ? line.compare(0, second, "0:") == 0
                                           : controllers.find("," + controller + ",") != std::string::npos;
    if (!wanted) continue;
    const std::string path = line.substr(second + 1);
    for (size_t end = path.find('/', 1); path.size() > 1; end = path.find('/', end + 1)) {
      directories.push_back(mount + path.substr(0, end));
      if (end == std::string::npos) break;
    }
  }
  return directories;
}

constexpr double kUnlimited = static_cast<double>(std::numeric_limits<int64_t>::max());

// What a control group leaves of a limit. The page cache counts as used but is given back on demand.
double left_in_group(const std::string& limit, const std::string& used, const std::string& stat, const char* cache) {
  const double bytes = number_in(limit, kUnlimited);
  if (bytes >= kUnlimited) return kUnlimited;
  return bytes - number_in(used, 0) + number_after(stat, cache, 0);
}

// What a limit of the process leaves when it has mapped `used` KiB.
double left_of(decltype(RLIMIT_AS) resource, const char* used) {
  struct rlimit limit {};
  if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
  return static_cast<double>(limit.rlim_cur) - 1024 * number_after("/proc/self/status", used, 0);
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

int usable_cores(const std::string& root) {
  if (root.empty() && std::getenv("OMP_NUM_THREADS")) return std::clamp(omp_get_max_threads(), 1, kMostThreads);
  double cores = omp_get_num_procs();
  for (const std::string& group : control_groups(root, "")) {
    std::ifstream file(group + "/cpu.max");
    double quota, period;
    if (file >> quota >> period && period > 0) cores = std::min(cores, quota / period);
  }
  for (const std::string& group : control_groups(root, "cpu")) {
    const double quota = number_in(group + "/cpu.cfs_quota_us", -1),
                 period = number_in(group + "/cpu.cfs_period_us", 0);
    if (quota > 0 && period > 0) cores = std::min(cores, quota / period);
  }
  return std::max(1, static_cast<int>(cores + 0.5));
}

int share_of_cores(int processes) {
  return std::getenv("OMP_NUM_THREADS") ? usable_cores() : std::max(1, usable_cores() / processes);
}

size_t available_memory(const std::string& root) {
  double available = number_after(root + "/proc/meminfo", "MemAvailable:", kUnlimited / 1024) * 1024;
  if (available >= kUnlimited) available = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  for (const std::string& group : control_groups(root, "")) {
    for (const char* limit : {"/memory.max", "/memory.high"})  // beyond the second everything becomes very slow
      available = std::min(
          available, left_in_group(group + limit, group + "/memory.current", group + "/memory.stat", "inactive_file"));
  }
  for (const std::string& group : control_groups(root, "memory"))
    available = std::min(available, left_in_group(group + "/memory.limit_in_bytes", group + "/memory.usage_in_bytes",
                                                  group + "/memory.stat", "total_inactive_file"));
  return static_cast<size_t>(std::max(available, 0.0));
}

size_t mappable_memory() {
  const double left = std::min(left_of(RLIMIT_AS, "VmSize:"), left_of(RLIMIT_DATA, "VmData:"));
  return left >= kUnlimited ? SIZE_MAX : static_cast<size_t>(std::max(left, 0.0));
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
