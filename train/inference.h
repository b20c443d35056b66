// inference.h: the subcommands that use a trained model: `generate` and `eval`. The model is loaded without the
// training half of an engine.
#pragma once

#include "train/options.h"

// Continues --prompt on standard output. Throws UsageError, std::runtime_error.
void generate(Options options);

// Prints the mean loss per token and the bits per byte on --val-data, or how often the likeliest ending is the right
// one of --hellaswag's, or both. Throws UsageError, std::runtime_error, also for a loss that is not finite.
void evaluate(Options options);
