// plan_command.h: the subcommand `plan`: what a run would take, and with --memory-budget and no --model the largest
// models that fit.
#pragma once

#include "train/options.h"

// To standard output, as tables or (--json) as JSON. Throws UsageError, std::runtime_error.
void print_plan(Options options);
