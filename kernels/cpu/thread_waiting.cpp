// thread_waiting.cpp: see thread_waiting.h.
#include "kernels/cpu/thread_waiting.h"

#include <unistd.h>

#include <cstdlib>

void spin_briefly(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") || std::getenv("OMP_WAIT_POLICY")) return;
  if (setenv("GOMP_SPINCOUNT", "1000", 0) == 0) execv("/proc/self/exe", argv);  // if it returns, the default will do
}
