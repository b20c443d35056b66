// multiple_choice_score.h: how often a model finds the likeliest ending of a question where it is the right one.
#pragma once

#include <cstdint>
#include <span>

#include "data/multiple_choice.h"
#include "train/engine.h"

struct MultipleChoiceScore {
  int64_t questions = 0;
  // Questions whose right ending has the lowest loss: summed over the ending's tokens, and its mean over them (llm.c's
  // acc_norm). The loss of a token is -ln of its probability after the context and the ending's earlier tokens.
  int64_t right_by_sum = 0, right_by_mean = 0;
  int64_t cut = 0;  // questions of which not all of the context fits with every ending
};

// One sequence per ending, padded to the longest of its micro-batch of the planned size. Of a context that does not fit
// the planned length with an ending, the last tokens are used. Throws std::runtime_error for an ending that alone does
// not fit, and for a loss that is not finite.
MultipleChoiceScore score(Engine& engine, std::span<const Question> questions);
