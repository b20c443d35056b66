// library_settings.cpp: see library_settings.h.
#include "kernels/cpu/library_settings.h"

#include <unistd.h>

#include <cstdlib>
#include <string>

namespace {

// Whether the environment now differs.
bool set_spinning() {
  return !std::getenv("OMP_WAIT_POLICY") && !std::getenv("GOMP_SPINCOUNT") && setenv("GOMP_SPINCOUNT", "1000", 0) == 0;
}

bool set_malloc() {
  constexpr const char* kName = "GLIBC_TUNABLES";
  const char* const now = std::getenv(kName);
  std::string tunables = now ? now : "";
  if (tunables.find("glibc.malloc.tcache_count=") != std::string::npos) return false;
  tunables += std::string(tunables.empty() ? "" : ":") + "glibc.malloc.tcache_count=0";
  return setenv(kName, tunables.c_str(), 1) == 0;
}

}  // namespace

void choose_library_settings(char** argv) {
  const bool spinning = set_spinning(), allocation = set_malloc();
  if (spinning || allocation) execv("/proc/self/exe", argv);  // if it returns, the defaults will do
}
