// trainer_state.h: trainer_state.json, what a checkpoint holds beside weights and optimizer state: step, data position,
// options, and size and checksum of every file, itself included. Format: docs/formats.md.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include <nlohmann/json.hpp>

#include "data/token_loader.h"
#include "train/file_io.h"

inline constexpr char kStateFile[] = "trainer_state.json";
inline constexpr char kOptimizerFile[] = "optimizer.safetensors";

struct TrainerState {
  uint32_t step = 0;       // updates made
  int64_t skipped = 0;     // of which were skipped for a loss that was not finite
  DataPosition position;   // of the next micro-batch
  nlohmann::json options;  // resolved
  std::string tuning;      // Backend::tuning()

  // Only of a state that was read.
  bool sealed = true;                             // false: format 1, which has no checksum of its own
  std::map<std::string, FileSummary> files = {};  // the checkpoint's other files
};

void write_trainer_state(const std::string& checkpoint, const TrainerState& state,
                         const std::map<std::string, FileSummary>& files);

// Reads and checks this one file. Throws std::runtime_error for one that is damaged, edited or of another format.
TrainerState read_trainer_state(const std::string& checkpoint);

// What is checked of a checkpoint: what will be read.
enum class CheckpointPart : uint8_t { kConfig, kModel, kEverything };

// Checks that the files are there and listed, with the size and the checksum that `state` has. Throws
// std::runtime_error naming the file.
void verify_files(const std::string& checkpoint, const TrainerState& state, CheckpointPart part);

// The same for the path of a --model; nothing where that is not a checkpoint.
void verify_model(const std::string& directory, CheckpointPart part);
