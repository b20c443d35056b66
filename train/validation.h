// validation.h: the loss on validation shards.
#pragma once

#include <cstdint>
#include <optional>

#include "data/token_loader.h"
#include "data/tokenizer.h"
#include "parallel/job.h"
#include "train/engine.h"

struct Validation {
  double loss = 0;  // mean, in nats per token
  int64_t tokens = 0;
  // Of the text that the tokens are, end-of-text tokens being none: 0 where the tokenizer is not known, or lacks one of
  // them.
  int64_t bytes = 0;

  // The sum of the losses in bits, those of end-of-text tokens too, over the bytes; nothing where these are not known.
  std::optional<double> bits_per_byte() const;
};

// The loss on the first `sequences` windows of the validation shards (0: all of them), each once, whatever the
// micro-batch; the last one may be smaller. `tokenizer` may be null. With several ranks, whose loaders deliver to each
// its own, every rank computes a share and has the result of all, with the same bits as one rank.
Validation validate(Engine& engine, TokenLoader& loader, int64_t sequences, const Tokenizer* tokenizer, Job& job);
