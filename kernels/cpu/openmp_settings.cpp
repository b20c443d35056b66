// openmp_settings.cpp: see openmp_settings.h.
#include "kernels/cpu/openmp_settings.h"

#include <unistd.h>

#include <cstdlib>

void choose_openmp_settings(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
  if (setenv("GOMP_SPINCOUNT", "1000", 0) == 0) execv("/proc/self/exe", argv);  // if it returns, the default will do
}
