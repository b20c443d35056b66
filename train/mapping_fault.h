// mapping_fault.h: a mapped file that becomes shorter, or whose disk fails, is a signal at the next look at it (SIGBUS)
// instead of an error of a call.
#pragma once

// From here on such a signal ends the program with exit code 1 and a line that names the file.
void explain_mapping_faults();
