// token_loader.h: micro-batches of token sequences out of shards, in an order that is a pure function of the seed, so
// that any position of any epoch can be resumed exactly. Memory: two micro-batches; nothing per sequence.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/shard.h"

struct TokenLoaderOptions {
  std::string pattern;          // --data: globs separated by commas
  std::string flag = "--data";  // that the pattern comes from, for messages
  int64_t micro_batch = 1;      // B, sequences
  int64_t sequence_length = 0;  // T, tokens
  int64_t vocabulary = 0;       // of the model: every token must be below it; 0: what the shards declare
  uint64_t seed = 0;            // of the run
  bool shuffle = true;          // false: shards in sorted order, windows from first to last (validation)
  bool prefetch = true;         // a thread prepares the next micro-batch while this one is used
  DataFormat format = DataFormat::kLlmc;
  // Data parallelism: of every ranks * B consecutive sequences this loader delivers the rank-th B.
  int64_t rank = 0, ranks = 1;
};

// B sequences of T tokens and what the embedding's backward pass needs to know about them.
struct MicroBatch {
  std::vector<int32_t> inputs;   // [B, T]
  std::vector<int32_t> targets;  // [B, T], the token after each input
  // The N = B*T positions grouped by input token: ids [N] distinct, ascending, then -1; starts [N + 1], N past the last
  // group; positions [N], ascending in a group. Group k is positions[starts[k] .. starts[k+1]).
  std::vector<int32_t> group_ids, group_starts, group_positions;
};

// Where a run stands in its data. Integers below 2^53 (and the seed, which the user chose), so that JSON keeps them.
struct DataPosition {
  int64_t sequence = 0;         // sequences consumed by all ranks since the start of epoch 0
  int64_t sequence_length = 0;  // T
  uint64_t seed = 0;
  int64_t fingerprint = 0;  // of the shards: token counts and samples of their contents, not their names

  bool operator==(const DataPosition&) const = default;
};

// No shard has a window of T + 1 tokens.
struct TooShort : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class TokenLoader {
 public:
  // Opens every shard that has a window of T + 1 tokens and leaves the others out. Throws std::runtime_error in one
  // line when nothing matches the pattern, a shard is damaged, or the shards disagree on the vocabulary; TooShort,
  // saying by how much, when no shard has a window.
  explicit TokenLoader(const TokenLoaderOptions& options);
  ~TokenLoader();
  TokenLoader(const TokenLoader&) = delete;
  TokenLoader& operator=(const TokenLoader&) = delete;

  // The next micro-batch; valid until the next call of next(), seek() or rewind(). Epochs follow one another without a
  // seam; within one, every window of T + 1 tokens (windows start every T tokens) is delivered once. Throws
  // std::runtime_error naming shard, position, token and vocabulary when a token is not in the vocabulary.
  const MicroBatch& next();

  DataPosition position() const;  // of the micro-batch that next() will return
  // Continues exactly from a position() of this or an earlier run, whatever its micro-batch size or number of ranks.
  // Throws std::runtime_error when the shards, T or the seed are not those the position was taken with.
  void seek(const DataPosition& position);
  void rewind();  // back to the first sequence of epoch 0

  // One line about the shards that were left out; empty when there are none.
  const std::string& left_out() const { return left_out_; }

  int64_t shards() const;
  int64_t tokens() const;               // in all shards
  int64_t sequences_per_epoch() const;  // windows in all shards
  int64_t tokens_per_epoch() const;     // sequences_per_epoch() * T; the rest of each shard is left out
  int64_t vocabulary() const;           // declared by the shards

 private:
  class Reader;
  class Prefetcher;

  TokenLoaderOptions options_;
  std::string left_out_;
  std::unique_ptr<Reader> reader_;
  int64_t sequence_ = 0;  // position().sequence
  MicroBatch current_;
  std::unique_ptr<Prefetcher> prefetcher_;  // after reader_: its thread ends first
};

// The files matching one glob, sorted; none is no error. A file or folder that has exactly the name given is meant by
// it, whatever characters of a glob that holds, and brackets that match nothing mean themselves. Throws
// std::runtime_error when a folder cannot be read.
std::vector<std::string> matching_files(const std::string& pattern);

// The globs of a comma-separated list. A comma is part of a name where only that leads to files.
std::vector<std::string> split_globs(const std::string& patterns);

// The files matching comma-separated globs, sorted by path, each once. Throws std::runtime_error "no shards match ..."
// for a glob without a file, naming the flag that it came from.
std::vector<std::string> expand_globs(const std::string& patterns, const std::string& flag = "--data");

// Fills the three group_* vectors of a micro-batch from its inputs, all in [0, vocabulary): a counting sort, O(N + V).
void group_tokens(MicroBatch& batch, int64_t vocabulary);
