// thread_waiting.cpp: see thread_waiting.h.
#include "kernels/cpu/thread_waiting.h"

#include <unistd.h>

#include <cstdlib>

namespace {

// Whether the variable is now set and was not before.
bool newly_set(const char* name, const char* value) { return !std::getenv(name) && setenv(name, value, 0) == 0; }

}  // namespace

void choose_thread_settings(char** argv) {
  const bool spin = !std::getenv("OMP_WAIT_POLICY") && newly_set("GOMP_SPINCOUNT", "1000");
  const bool blas = newly_set("OPENBLAS_NUM_THREADS", "1");
  if (spin || blas) execv("/proc/self/exe", argv);  // if it returns, the defaults will do
}
