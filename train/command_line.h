// command_line.h: from argv to Options, by CLI11. The same names work in a TOML file given by --config.
#pragma once

#include <string>

#include "train/options.h"

enum class Command { kTrain, kPlan, kGenerate, kEval, kSelftest, kExit };

// Prints --help or --version itself and returns kExit. Throws UsageError.
Command parse_command_line(int argc, char** argv, Options& options);
