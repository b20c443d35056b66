// blas_core.h: makes OpenBLAS use the kernels this processor deserves, and keeps it on one thread per call.
#pragma once

#include <string>

// An OpenBLAS that is older than the processor may fall back to its AVX2 kernels on one that has AVX-512, at half the
// speed (on a Zen 5, OpenBLAS 0.3.21: 123 against 238 GFLOP/s a core). The library chooses when it is loaded, before
// main(), and only the environment can tell it otherwise. So this function, called first in main(), sets
// OPENBLAS_CORETYPE=SkylakeX and executes the program again when the processor has AVX-512, OpenBLAS picked Haswell or
// Zen, and the variable is not set: a user's choice stands, and it cannot happen twice. Does not return when it
// executes the program again; false: there was nothing to do, or it could not be done.
bool select_blas_core(char** argv);

// Calls come from OpenMP threads that share the work among themselves, so the library must not start its own.
void use_one_blas_thread();

// For the banner: "OpenBLAS SkylakeX", or "CBLAS" for a library that does not name itself.
std::string blas_description();
