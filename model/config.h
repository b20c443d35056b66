// config.h: the shape of a GPT-2 and where it can come from: a preset's name or a Hugging Face config.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flora/parameter.h"

struct Gpt2Config {
  int64_t vocabulary = 50257;
  int64_t positions = 1024;  // longest sequence: rows of the position embedding
  int64_t layers = 12;
  int64_t heads = 12;
  int64_t channels = 768;
  bool tied_head = true;  // the head is the token embedding

  int64_t head_dim() const { return channels / heads; }
  // Rows of the token embedding in memory: the vocabulary rounded up to a multiple of 128.
  int64_t padded_vocabulary() const { return (vocabulary + 127) / 128 * 128; }
  int64_t parameter_count() const;
  // Model FLOPs of a training step per token: 6 N + 6 L C T, N all parameters.
  double flops_per_token(int64_t sequence) const;
};

// "d12", "gpt2:dN" and "gpt3:cN" with llm.c's depths and widths, or tiny, mini, small (for CPUs; small is 4 x 384). The
// vocabulary is GPT-2's. Throws std::invalid_argument that lists what there is.
Gpt2Config preset(const std::string& name);
bool is_preset(const std::string& name);
std::vector<std::string> preset_names();

// Reads a Hugging Face config.json. Throws std::runtime_error naming the file and the field for anything that is not
// GPT-2 as this program computes it (another activation, another inner width, ...).
Gpt2Config read_config(const std::string& path);
std::string config_json(const Gpt2Config& config);

// Throws std::invalid_argument when the numbers cannot be a model (a head dimension that does not divide, zero layers,
// a number beyond all models, ...).
void validate(const Gpt2Config& config);

// All trained tensors in the order of Hugging Face's files: wte, wpe, the blocks, ln_f, and lm_head when it is untied.
std::vector<Parameter> gpt2_parameters(const Gpt2Config& config);
