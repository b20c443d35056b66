// run_setup.h: from options as the user gave them to options with every default chosen, and to the engine's
// configuration.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "data/tokenizer.h"
#include "kernels/backend.h"
#include "train/engine.h"
#include "train/options.h"
#include "train/weights_io.h"

// Where a process of several stands on its machine: which GPU is its own, and how many processes share its cores.
struct DevicePlace {
  int ordinal = 0, sharing = 1;
};

// The device the options ask for; chooses options.threads. Throws UsageError when it cannot be had; `why` says in words
// what "auto" chose.
std::unique_ptr<Backend> make_backend(Options& options, std::string& why, const DevicePlace& place = {});

// A usable device of the options' kind, or where there is none a stand-in that plans for one; `note` then says so.
std::unique_ptr<Backend> make_backend_for_plan(Options& options, std::string& note);

// What a run is made from: the options before defaults are chosen, and what they meet.
struct RunRequest {
  Options options;
  std::string device;      // name of the backend
  int64_t vocabulary = 0;  // the data's, or 0 where there is no data to ask (then GPT-2's)
  bool training = true;
  std::string checkpoint;  // to resume from; it says itself what the model is: --model may be gone by then
};

struct RunSetup {
  Options options;     // resolved: nothing is left to be chosen
  ModelSource source;  // where weights come from
  EngineConfig engine;
  RunRequest request;  // what it was resolved from

  // Of find_tokenizer().
  std::shared_ptr<const Tokenizer> tokenizer;           // null: none is known
  std::map<std::string, std::string> checkpoint_files;  // name and contents; the originals may be gone by then
  std::string tokenizer_warning;                        // one line about one that was found and cannot be read
};

// With kPlannersSettings some settings only have values to start from: what the planner may change is not checked
// against the rest.
enum class Undecided : uint8_t { kNothing, kPlannersSettings };

// Fills in defaults for the device and the model and checks that it all fits together. Throws UsageError.
RunSetup resolve(const RunRequest& request, Undecided undecided = Undecided::kNothing);

int64_t default_micro_batch(const std::string& device);

// Finds the tokenizer (run_tokenizer.cpp) of a resolved setup, what a checkpoint takes along of it, and the model's
// end-of-text tokens where the model does not say them. Throws UsageError, std::runtime_error.
void find_tokenizer(RunSetup& setup);

// Throws UsageError for a --prompt without a tokenizer.
void check_prompt(const RunSetup& setup);

// Relative paths of data, tokenizer and model made absolute, so that a run goes on from any working directory. Globs
// stay globs.
Options with_absolute_paths(const Options& options);

// Throws std::runtime_error for shards that a checkpoint names and that are not there now.
void check_saved_shards(const Options& options, const std::string& checkpoint);
