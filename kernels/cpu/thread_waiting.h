// thread_waiting.h: how OpenMP's threads wait for each other at the end of a loop, and that the BLAS starts none.
#pragma once

// libgomp's threads spin for milliseconds by default. On a machine with anything else to do, the spinning thread holds
// the core that the thread it waits for needs. A short spin costs nothing when the machine is quiet and saves a lot
// when it is not (docs/performance.md). OpenBLAS starts a thread per core when it is loaded, none of which is used
// here; each maps a buffer, and waits for ever where address space is limited. Both libraries read their settings
// before main(), so this sets GOMP_SPINCOUNT and OPENBLAS_NUM_THREADS and executes the program again. What the user has
// chosen (the first also by OMP_WAIT_POLICY) stays; it does nothing when both are set, hence never twice.
void choose_thread_settings(char** argv);
