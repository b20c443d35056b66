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
#include <vector>

#include "train/engine.h"
#include "train/trainer_state.h"

// `files_along`: name and contents of what goes along (the tokenizer's files). Writes `run`/step_NNNNNNNN, moves
// `run`/latest, and removes all but the `keep` newest (0: keeps all). Returns the path.
std::string save_checkpoint(const std::string& run, const TrainerState& state, Engine& engine,
                            const std::map<std::string, std::string>& files_along, int64_t keep);

// Reads trainer_state.json and checks it and every other file (train/trainer_state.h). Throws std::runtime_error naming
// the file.
TrainerState read_checkpoint(const std::string& checkpoint);

// What the other ranks do while rank 0 saves: with weights that ranks keep together, they take part in gathering them.
void take_part_in_checkpoint(Engine& engine);

// A line for each tensor of weights and optimizer states: its name and the CRC-32 of its bits.
std::string tensor_checksums(Engine& engine);
// Of such texts, one of each rank: the first rank and tensor that differ from rank 0's, in words; empty where none
// does.
std::string first_difference(const std::vector<std::string>& checksums);

// Weights (and master copies) and optimizer state into an allocated engine. Throws std::runtime_error naming what is
// missing.
void load_checkpoint(const std::string& checkpoint, Engine& engine);
