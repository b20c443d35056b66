// local_ranks.h: --devices: a process of this program for each device of this machine, started and waited for.
#pragma once

// Starts `ranks` processes of this program with its arguments and torchrun's variables, and waits for them. They share
// a port that is found free, and nobody else's connections are let in. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed
// on, Ctrl-Z stops all; should this process be killed they get SIGTERM. When one fails and the others have not ended
// ten seconds later, they are killed. Returns the exit code of the first that failed (128 + signal for a signal), else
// 0. To be called before there are threads. Throws std::runtime_error where processes cannot be started.
int run_local_ranks(int ranks, char** argv);
