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

const char* better_blas_kernels() {
#if defined(__x86_64__)
  if (!openblas_get_corename || std::string(openblas_get_corename()) != "Prescott") return nullptr;
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "SkylakeX";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "Haswell";
#endif
  return nullptr;
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
  if (const char* const kernels = better_blas_kernels()) choose("OPENBLAS_CORETYPE", kernels);
  if (again) execv("/proc/self/exe", argv);  // if it returns, the defaults will do
}
