// library_settings.h: what libraries read from the environment before main().
#pragma once

// Sets what the user has not set, and executes the program again if that was anything:
// * GOMP_SPINCOUNT (unless there is OMP_WAIT_POLICY). libgomp's threads spin for milliseconds at the end of a loop. On
//   a machine with anything else to do, the spinning thread holds the core that the thread it waits for needs. A short
//   spin costs nothing when the machine is quiet and saves a lot when it is not (docs/performance.md).
// * In GLIBC_TUNABLES, glibc.malloc.tcache_count=0. glibc cuts a few bytes off an aligned block and keeps them in a
//   thread's cache, where they stay and separate blocks that were given back, so that these never become one again: up
//   to 24 MiB a thread of the blocks of a MiB or two that oneDNN packs operands into (docs/performance.md).
// What is set is inherited, so it never happens twice.
void choose_library_settings(char** argv);
