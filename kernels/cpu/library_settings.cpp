// library_settings.cpp: see library_settings.h. The OpenBLAS functions are weak symbols: another CBLAS links as well.
#include "kernels/cpu/library_settings.h"

#include <unistd.h>

#include <cstdlib>

extern "C" {
char* openblas_get_corename(void) __attribute__((weak));
void openblas_set_num_threads(int threads) __attribute__((weak));
}

void use_one_blas_thread() {
  if (openblas_set_num_threads) openblas_set_num_threads(1);
}

bool blas_misses_avx2() {
#if defined(__x86_64__)
  return openblas_get_corename && std::string(openblas_get_corename()) == "Prescott" &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

std::string blas_description() {
  return openblas_get_corename ? std::string("OpenBLAS ") + openblas_get_corename() : "CBLAS";
}

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
