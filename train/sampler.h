// sampler.h: text from a model, one token at a time. Every token costs a forward pass over the text so far (at most the
// planned sequence length); there is no cache of keys and values.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "train/engine.h"

struct SamplingOptions {
  int64_t tokens = 200;
  float temperature = 0.8f;  // 0: the likeliest token
  int64_t top_k = 50;        // 0: all
  uint64_t seed = 0;
  uint32_t step = 0;  // part of the random stream, so that samples of different steps differ
};

// Continues `prompt`, which is not empty; calls emit(id) for every new token and stops at one of `stops`. Only tokens
// that the tokenizer has are chosen (null: all); the vocabulary of a model is often padded. Throws std::runtime_error
// when the model's logits are not finite.
void sample(Engine& engine, std::vector<int32_t> prompt, const std::vector<int32_t>& stops, const Tokenizer* tokenizer,
            const SamplingOptions& options, const std::function<void(int32_t)>& emit);

// The prompt and its continuation as printable() text. Without a tokenizer the ids themselves, separated by spaces, and
// no prompt.
std::string sample_text(Engine& engine, const Tokenizer* tokenizer, const std::string& prompt,
                        const SamplingOptions& options);
