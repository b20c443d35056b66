// blas_core.cpp: see blas_core.h. The OpenBLAS functions are weak symbols: another CBLAS links as well.
#include "kernels/cpu/blas_core.h"

#include <string>

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
