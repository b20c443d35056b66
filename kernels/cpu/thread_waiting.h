// thread_waiting.h: how OpenMP's threads wait for each other at the end of a loop.
#pragma once

// libgomp's threads spin for milliseconds by default. On a machine with anything else to do, the spinning thread holds
// the core that the thread it waits for needs. A short spin costs nothing when the machine is quiet and saves a lot
// when it is not (docs/performance.md). libgomp reads its settings before main(), so this sets GOMP_SPINCOUNT and
// executes the program again; it does nothing when the user has chosen (GOMP_SPINCOUNT or OMP_WAIT_POLICY), hence never
// twice.
void spin_briefly(char** argv);
