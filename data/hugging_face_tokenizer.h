// hugging_face_tokenizer.h: GPT-2's kind of tokenizer (byte-level BPE) in Hugging Face's files, so that AutoTokenizer
// works on a checkpoint and prompts on a folder of theirs.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "data/tokenizer.h"

// The files of a Hugging Face folder that make up a tokenizer, each where it is there.
inline constexpr const char* kHuggingFaceTokenizerFiles[] = {"vocab.json",        "merges.txt",
                                                             "tokenizer.json",    "tokenizer_config.json",
                                                             "added_tokens.json", "special_tokens_map.json"};

// Whether a folder holds vocab.json and merges.txt, or tokenizer.json.
bool has_hugging_face_tokenizer(const std::string& directory);

// Reads vocab.json and merges.txt, or else tokenizer.json. Tokens that were added to them are left out from id `limit`
// on: a model often has fewer rows than its tokenizer special tokens. Throws std::runtime_error, one line naming the
// file, when it is damaged or another kind of tokenizer.
Tokenizer read_hugging_face_tokenizer(const std::string& directory, int64_t limit);

// vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, by name, that make transformers'
// AutoTokenizer this tokenizer; nothing for one that is no byte-level BPE (a byte without a token, a token that is not
// made from two). `length`: the longest text of the model, in tokens.
std::map<std::string, std::string> hugging_face_tokenizer_files(const Tokenizer& tokenizer, int64_t length);
