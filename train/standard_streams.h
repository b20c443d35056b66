// standard_streams.h: standard output and error as files that may be closed, full, or a pipe whose reader has gone.
#pragma once

#include <string>

// A standard stream that is closed becomes one that cannot be written (or read) but is open: else the next file that is
// opened, a checkpoint perhaps, would get its number and what is printed. A file that reaches a limit on its size
// (ulimit -f) is an error of that write from here on, not a signal. Call it before anything is opened.
void prepare_standard_streams();

// From here on a pipe whose reader has gone (| head -1) loses what is printed and ends nothing.
void outlive_reader();

// "train_gpt2: <message>" on standard error, as one line whatever characters came with a value: what cannot be printed
// is replaced, of a very long message there are the beginning and the end.
void say_on_error(std::string message);

// The same as a warning; nothing for an empty one.
void warn(const std::string& warning);

// Of a job's processes rank 0 speaks: the others lose what is printed and their warnings, and errors begin with "rank
// N: ".
void speak_as_rank(int rank);

// Flushes standard output. Whether all that was printed has arrived; if not, one line on standard error says so, but
// for a reader that has gone.
bool output_arrived();
