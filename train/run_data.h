// run_data.h: which shards a run or an evaluation reads, and whether they suit the model.
#pragma once

#include <cstdint>
#include <string>

#include "train/options.h"
#include "train/run_setup.h"

// Makes the default training data (text found on this machine) where no --data is given, and finds validation shards
// beside the training shards. Changes options.data and options.val_data. Returns why there is no validation data, or
// nothing.
std::string resolve_data(Options& options);

// The shards of an evaluation that was given no --val-data: those beside --data (or, where there are none, --data
// itself), else those of the run that made the model. Returns what they are, in words. Throws UsageError.
std::string resolve_evaluation_data(Options& options);

// Glob patterns of the validation shards that may belong to one pattern of training shards, the likeliest first: the
// last "train" of the file name that is a word becomes "val" ("a-train_train_*.bin": "a-train_val_*.bin"), or a folder
// named train becomes one named val. Numbers become *: a training shard's number means nothing to the others.
std::vector<std::string> validation_patterns(const std::string& training_pattern);

// The vocabulary of the shards: what they declare, or a larger one that --vocab-size gives; of headerless shards that
// of --vocab-size, or 0. Throws UsageError.
int64_t data_vocabulary(const Options& options, const std::string& pattern, const std::string& flag);

// One line when the vocabularies of data (0: not known) and model make it likely that they do not belong together, or
// when a headerless vocabulary had to be guessed; else empty.
std::string vocabulary_warning(const RunSetup& setup, int64_t data, const std::string& pattern);
