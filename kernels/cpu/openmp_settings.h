// openmp_settings.h: what OpenMP reads from the environment before main().
#pragma once

// Sets what the user has not set, and executes the program again if that was anything:
// * GOMP_SPINCOUNT (unless there is OMP_WAIT_POLICY). libgomp's threads spin for milliseconds at the end of a loop. On
//   a machine with anything else to do, the spinning thread holds the core that the thread it waits for needs. A short
//   spin costs nothing when the machine is quiet and saves a lot when it is not (docs/performance.md).
// What is set is inherited, so it never happens twice.
void choose_openmp_settings(char** argv);
