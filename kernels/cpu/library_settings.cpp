// library_settings.cpp: see library_settings.h.
#include "kernels/cpu/library_settings.h"

#include <unistd.h>

#include <cstdlib>

#include "kernels/cpu/blas_core.h"

void choose_library_settings(char** argv) {
  bool again = false;
  const auto choose = [&](const char* name, const char* value) {
    again = (!std::getenv(name) && setenv(name, value, 0) == 0) || again;
  };
  if (!std::getenv("OMP_WAIT_POLICY")) choose("GOMP_SPINCOUNT", "1000");
  choose("OPENBLAS_NUM_THREADS", "1");
  if (blas_misses_avx2()) choose("OPENBLAS_CORETYPE", "Haswell");
  if (again) execv("/proc/self/exe", argv);  // if it returns, the defaults will do
}
