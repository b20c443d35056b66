// resume.h: where a run goes on from, with what, and in which directory (--resume).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "train/options.h"
#include "train/run_folder.h"
#include "train/trainer_state.h"

// Finds and reads the checkpoint that options.resume means, fills in the options that come from it, and takes the
// directory that the run goes on in: the checkpoint's own, or --out. It is held before anything is read from it,
// because another run may be writing there. `changes` becomes what the options change of the training, a line each.
// Where no step is left to be made, says so and leaves `folder` empty. Throws UsageError for a directory that holds
// later checkpoints or another run.
ResumePoint resume(Options& options, std::optional<RunFolder>& folder, TrainerState& state,
                   std::vector<std::string>& changes);

// The same for the other processes of a job, when rank 0 has done that: reads the checkpoint and fills in the options.
void follow_resume(Options& options, const std::string& checkpoint, const std::string& out, TrainerState& state);
