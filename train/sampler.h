// sampler.h: text from a model, one token at a time. The keys and values of the text so far are kept, so a token costs
// one pass over the weights; the sampled text is that of a full forward pass for each token, but for rounding.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "train/options.h"

struct SamplingOptions {
  int64_t tokens = 200;
  float temperature = 0.8f;  // 0: the likeliest token
  int64_t top_k = 50;        // 0: all
  float top_p = 1.0f;        // the fewest likeliest tokens that are together as probable as this; 1: all
  uint64_t seed = 0;
  bool to_the_end = false;  // whatever signals come: ranks that gather weights make it together
  uint32_t step = 0;        // part of the random stream, so that samples of different steps differ
};
SamplingOptions sampling_options(const Options& options, uint32_t step = 0);

// Where the tokens begin that the one behind a text of `length` tokens is chosen by: at 0 while the text fits into the
// window; when it does not, the older half of the window's tokens is left out, and again whenever the window is full.
// Depends on nothing else, so a text that is taken as a prompt goes on as it would have.
int64_t context_begin(int64_t length, int64_t window);

// The next token by its logits, one of `allowed` (not empty); ties go to the lower id. `uniform` in
// [0, 1) decides. Temperature first, then top_k, then top_p, which counts the probabilities of what top_k has left, as
// Hugging Face does.
int32_t choose_token(const std::vector<float>& logits, const std::vector<int32_t>& allowed,
                     const SamplingOptions& options, float uniform);

// Continues `prompt`, which is not empty; calls emit(id) for every new token and stops at one of `stops`. Only tokens
// that the tokenizer has are chosen (null: all); the vocabulary of a model is often padded. The engine was made with
// config.sampling. Throws std::runtime_error when the model's logits are not finite.
void sample(Engine& engine, std::vector<int32_t> prompt, const std::vector<int32_t>& stops, const Tokenizer* tokenizer,
            const SamplingOptions& options, const std::function<void(int32_t)>& emit);

// The prompt and its continuation as printable() text that ends with a whole character. Without a tokenizer the ids
// themselves, separated by spaces, and no prompt.
std::string sample_text(Engine& engine, const Tokenizer* tokenizer, const std::string& prompt,
                        const SamplingOptions& options);
