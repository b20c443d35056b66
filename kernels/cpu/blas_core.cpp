// blas_core.cpp: see blas_core.h. The OpenBLAS functions are weak symbols: another CBLAS links as well.
#include "kernels/cpu/blas_core.h"

#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <string>

extern "C" {
char* openblas_get_corename(void) __attribute__((weak));
void openblas_set_num_threads(int threads) __attribute__((weak));
}

bool select_blas_core(char** argv) {
#if defined(__x86_64__)
  if (!openblas_get_corename || std::getenv("OPENBLAS_CORETYPE")) return false;
  const std::string core = openblas_get_corename();
  if (core != "Haswell" && core != "Zen") return false;
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (!avx512 || setenv("OPENBLAS_CORETYPE", "SkylakeX", 0) != 0) return false;
  // The resolved path keeps the program's name in process lists; the link itself is the fallback.
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  if (length > 0) {
    path[length] = '\0';
    execv(path, argv);
  }
  execv("/proc/self/exe", argv);
#else
  (void)argv;
#endif
  return false;
}

void use_one_blas_thread() {
  if (openblas_set_num_threads) openblas_set_num_threads(1);
}

std::string blas_description() {
  return openblas_get_corename ? std::string("OpenBLAS ") + openblas_get_corename() : "CBLAS";
}
