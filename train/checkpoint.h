// checkpoint.h: a run's state as a directory that Hugging Face's GPT2LMHeadModel loads: config.json, model.safetensors,
// and beside them optimizer.safetensors, trainer_state.json (step, data position, options, checksums of the other
// files) and the tokenizer. Format: docs/formats.md.
//
// A checkpoint is written under a temporary name, synced and renamed; then the symbolic link `latest` moves. A kill at
// any instant leaves the previous checkpoint as it was.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include <nlohmann/json.hpp>

#include "data/token_loader.h"
#include "train/engine.h"

struct TrainerState {
  uint32_t step = 0;       // updates made
  int64_t skipped = 0;     // of which were skipped for a loss that was not finite
  DataPosition position;   // of the next micro-batch
  nlohmann::json options;  // resolved
  std::string tuning;      // Backend::tuning()
};

// `files_along`: name and contents of what goes along (the tokenizer's files). Writes `run`/step_NNNNNNNN, moves
// `run`/latest, and removes all but the `keep` newest (0: keeps all). Returns the path.
std::string save_checkpoint(const std::string& run, const TrainerState& state, Engine& engine,
                            const std::map<std::string, std::string>& files_along, int64_t keep);

// The checkpoint that a --resume argument means: the directory itself, or the newest finished one of a run (`latest`,
// or the one after it when a kill came between renaming it and moving the link). Throws std::runtime_error.
std::string find_checkpoint(const std::string& path);

// Reads trainer_state.json and checks size and checksum of every file it lists. Throws std::runtime_error naming the
// file.
TrainerState read_checkpoint(const std::string& checkpoint);

// Weights (and master copies) and optimizer state into an allocated engine. Throws std::runtime_error naming what is
// missing.
void load_checkpoint(const std::string& checkpoint, Engine& engine);

// The step of the newest finished checkpoint of a run, 0 when there is none.
uint32_t newest_step(const std::string& run);

// Removes what an interrupted save left behind.
void clean_run(const std::string& run);
