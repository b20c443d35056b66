// weights_io.h: weights from and to files: Hugging Face directories (one model.safetensors, or shards with an index)
// and llm.c's .bin models (versions 3, fp32, and 5, bf16).
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "flora/parameter.h"
#include "kernels/backend.h"
#include "model/config.h"
#include "train/file_io.h"

// What --model means: a preset's name, a directory with config.json, a config.json, or an llm.c .bin.
struct ModelSource {
  enum class Kind { kPreset, kDirectory, kConfigFile, kLlmcBin } kind;
  std::string path;
  Gpt2Config config;
  bool has_weights;
};

// Throws UsageError for an unknown model and for a directory whose only weights are of a kind that is not read here
// (PyTorch's, TensorFlow's, ...), std::runtime_error for a file that cannot be used, such as the config.json of a
// checkpoint that is not the one that was saved. (The checkpoint's weights: verify_model() in trainer_state.h.)
ModelSource find_model(const std::string& name);

// Fills every parameter (and master copy) of the store. Tensors may be fp32, fp16 or bf16, named with or without
// "transformer.", "_orig_mod." and "module."; of a tied pair either may be there. A missing tensor or another shape
// throws std::runtime_error naming it.
void load_weights(const ModelSource& source, ParameterStore& store, Backend& backend);

// Writes model.safetensors into `directory` in the weights' own dtype (the fp32 master copies, where there are any, are
// optimizer state), or model-00001-of-0000N.safetensors and model.safetensors.index.json when there is more than
// `shard_bytes`. Returns size and checksum of each file. With "" as directory nothing is written, but the same layers
// are acquired in the same order.
std::map<std::string, FileSummary> save_weights(const std::string& directory, ParameterStore& store, Backend& backend,
                                                size_t shard_bytes = size_t{5} << 30);
