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
  // Longest sequence that the weights were trained with; 0: not known, taken for `positions`.
  int64_t trained_positions = 0;
  // bos_token_id, -1: not known; and eos_token_id, which may be several, empty: not known.
  int64_t begin_of_text = -1;
  std::vector<int64_t> end_of_text = {};

  int64_t usable_positions() const { return trained_positions > 0 ? trained_positions : positions; }
  // end_of_text, or where it is not known GPT-2's 50256 (a vocabulary may be padded), or the last token.
  std::vector<int64_t> stop_tokens() const;

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

// Hugging Face's generation_config.json: reads token ids that config.json does not say; writes those of the model.
void read_generation_config(const std::string& path, Gpt2Config& config);
std::string generation_config_json(const Gpt2Config& config);

// Throws std::invalid_argument when the numbers cannot be a model (a head dimension that does not divide, zero layers,
// a number beyond all models, ...).
void validate(const Gpt2Config& config);

// All trained tensors in the order of Hugging Face's files: wte, wpe, the blocks, ln_f, and lm_head when it is untied.
std::vector<Parameter> gpt2_parameters(const Gpt2Config& config);
