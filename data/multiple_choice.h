// multiple_choice.h: questions with several endings, of which one is right, as token ids: HellaSwag's, which
// data/hellaswag.py prepares, or others in llm.c's file format for them. Format: docs/formats.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Question {
  std::vector<int32_t> context;               // at least one token
  std::vector<std::vector<int32_t>> endings;  // at least two, of at least one token each
  int64_t right = 0;                          // which ending it is
};

struct MultipleChoice {
  std::vector<Question> questions;
  int64_t vocabulary = 0;  // every token is below it; GPT-2's where the file does not say
};

// Throws std::runtime_error, one line naming the file and the remedy, when it cannot be read or is not of this format.
MultipleChoice read_multiple_choice(const std::string& path);
