// resume.cpp: see resume.h.
#include "train/resume.h"

#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "train/checkpoint.h"
#include "train/metrics.h"
#include "train/run_setup.h"
#include "train/standard_streams.h"

namespace {

bool is_same_directory(const std::string& a, const std::string& b) {
  std::error_code absent;
  return std::filesystem::equivalent(a, b, absent);
}

// What the options do not say comes from the checkpoint. Returns what they change of the training.
std::vector<std::string> restore(Options& options, const std::string& checkpoint, const TrainerState& state) {
  options.model = with_absolute_paths(options).model;  // as in a checkpoint
  const Restored restored = restore_options(options, state.options);
  std::string missing;
  for (const std::string& flag : restored.missing) missing += " --" + flag;
  if (!state.sealed || !missing.empty()) {
    warn(checkpoint + " is of an earlier version" + (state.sealed ? "" : ": its trainer_state.json has no checksum") +
         (missing.empty() ? "" : "; defaults are taken for" + missing));
  }
  if (options.was_given("data") && !options.was_given("val-data")) options.val_data.clear();  // beside the moved data
  return restored.changes;
}

// read_checkpoint(), which where it fails says what else there is.
TrainerState read_or_name_another(const ResumePoint& from) {
  try {
    return read_checkpoint(from.checkpoint);
  } catch (const std::runtime_error& error) {
    std::string other;  // the newest
    for (const uint32_t step : finished_steps(from.run)) {
      const std::string path = from.run + "/" + checkpoint_name(step);
      if (path != from.checkpoint) other = path;
    }
    if (other.empty()) throw;
    throw std::runtime_error(std::string(error.what()) + "; another one: --resume " + other + " --out DIR");
  }
}

}  // namespace

void follow_resume(Options& options, const std::string& checkpoint, const std::string& out, TrainerState& state) {
  state = read_checkpoint(checkpoint);
  restore(options, checkpoint, state);
  options.out = out;
  check_options(options);
}

ResumePoint resume(Options& options, std::optional<RunFolder>& folder, TrainerState& state,
                   std::vector<std::string>& changes) {
  ResumePoint from = find_checkpoint(options.resume);
  const bool in_place = !options.was_given("out") || is_same_directory(options.out, from.run);
  if (in_place) {
    folder.emplace(from.run);
    from = find_checkpoint(options.resume);  // as it is now that nobody changes it
  }
  state = read_or_name_another(from);
  changes = restore(options, from.checkpoint, state);
  if (in_place) {
    options.out = from.run;
    clean_run(from.run);
    mend_latest(from.run);
  }
  check_options(options);
  if (state.step >= options.steps) {
    std::printf("nothing to do: %s is complete, at step %u of %lld; --steps N with a larger N goes on\n",
                from.checkpoint.c_str(), state.step, static_cast<long long>(options.steps));
    folder.reset();
    return from;
  }
  if (!in_place) options.out = folder.emplace(options.out).path();
  if (in_place && newest_step(from.run) > state.step) {
    throw UsageError(from.run + " holds checkpoints after step " + std::to_string(state.step) + "; to go on from " +
                     from.checkpoint + " name another --out");
  }
  if (!in_place && (newest_step(options.out) > 0 || !goes_on_from(options.out, from.run, state.step))) {
    throw UsageError(options.out + " holds another run already: go on with --resume " + options.out +
                     ", or name another --out");
  }
  return from;
}
