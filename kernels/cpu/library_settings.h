// library_settings.h: what the CPU backend asks of OpenMP and a CBLAS beside loops and products: their settings, some
// of which they read from the environment before main().
#pragma once

#include <string>

// Calls come from OpenMP threads that share the work among themselves, so the library must not start its own.
void use_one_blas_thread();

// OPENBLAS_CORETYPE of better kernels, where OpenBLAS does not know this processor and has taken its oldest ones
// although there is AVX-512 or AVX2; else null.
const char* better_blas_kernels();

// For the banner: "OpenBLAS SkylakeX", or "CBLAS" for a library that does not name itself.
std::string blas_description();

// Sets what the user has not set, and executes the program again if that was anything:
// * GOMP_SPINCOUNT (unless there is OMP_WAIT_POLICY). libgomp's threads spin for milliseconds at the end of a loop. On
//   a machine with anything else to do, the spinning thread holds the core that the thread it waits for needs. A short
//   spin costs nothing when the machine is quiet and saves a lot when it is not (docs/performance.md).
// * OPENBLAS_NUM_THREADS. OpenBLAS starts a thread per core when it is loaded, none of which is used here; each maps a
//   buffer, and waits for ever where address space is limited.
// * OPENBLAS_CORETYPE, where there are better_blas_kernels().
// What is set is inherited, so it never happens twice.
void choose_library_settings(char** argv);
