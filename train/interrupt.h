// interrupt.h: the signals that ask a training run to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal;
// nothing under nohup) and SIGUSR1 (the warning of a batch system). The first one is answered at once and seen by the
// training loop between steps. A second Ctrl-C or SIGTERM ends the program where it is, with 128 + signal; one that
// repeats the first within a tenth of a second does not, because terminals and `timeout` send theirs twice.
#pragma once

#include <cstdint>
#include <string>

// A thread of its own takes these signals from here on; to be called before there are others. No handler may run on a
// thread that computes: oneDNN's products use memory of the heap as their stack, and what the kernel writes below the
// stack pointer for a handler would destroy what lies there.
void take_signals();

// Such a signal is answered in silence: another process of the job says it.
void answer_interrupts_silently();

// From here on a signal that was taken asks for a stop. Before, each has its default action and ends the program.
void watch_for_interrupts();

// What the answers name: the step that is being computed, and the last checkpoint ("" where there is none).
void say_when_interrupted(uint32_t step, const std::string& last_checkpoint);

// The first signal that asked for a stop; 0 while there was none.
int interrupting_signal();
inline bool interrupted() { return interrupting_signal() != 0; }
