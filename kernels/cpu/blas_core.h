// blas_core.h: the things the CPU backend asks of a CBLAS beyond its matmuls.
#pragma once

#include <string>

// Calls come from OpenMP threads that share the work among themselves, so the library must not start its own.
void use_one_blas_thread();

// Whether OpenBLAS does not know this processor and has taken its oldest kernels, although the processor has AVX2.
bool blas_misses_avx2();

// For the banner: "OpenBLAS SkylakeX", or "CBLAS" for a library that does not name itself.
std::string blas_description();
