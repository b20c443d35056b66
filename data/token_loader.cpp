// token_loader.cpp: see token_loader.h. A micro-batch costs B small reads from the page cache, a check of every token,
// and a counting sort; with prefetch, on a thread of its own.
#include "data/token_loader.h"

#include <glob.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <filesystem>
#include <mutex>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

#include "data/data_order.h"

namespace {

int64_t windows_in(const Shard& shard, int64_t sequence_length) { return (shard.tokens() - 1) / sequence_length; }

void check_options(const TokenLoaderOptions& options) {
  const bool valid = options.micro_batch > 0 && options.sequence_length > 0 && options.ranks > 0 && options.rank >= 0 &&
                     options.rank < options.ranks && options.vocabulary >= 0;
  if (!valid) throw std::logic_error("TokenLoader: micro_batch, sequence_length, rank or vocabulary out of range");
}

std::string too_short(const Shard& shard, int64_t sequence_length) {
  return shard.path() + ": holds " + std::to_string(shard.tokens()) + " tokens, " +
         std::to_string(sequence_length + 1 - shard.tokens()) + " too few for one window of --seq-len " +
         std::to_string(sequence_length) + " + 1";
}

// The shards with at least one window; `left_out` names the others.
std::vector<Shard> open_shards(const TokenLoaderOptions& options, std::string& left_out) {
  std::vector<Shard> shards, short_ones;
  std::optional<std::pair<std::string, int64_t>> first;
  for (const std::string& path : expand_globs(options.pattern, options.flag)) {
    Shard shard(path, options.format);
    if (!first) first = {path, shard.vocabulary()};
    if (shard.vocabulary() != first->second)
      throw std::runtime_error("shards disagree on the vocabulary: " + first->first + " has " +
                               std::to_string(first->second) + ", " + path + " has " +
                               std::to_string(shard.vocabulary()) + "; narrow the pattern to shards of one tokenizer");
    (windows_in(shard, options.sequence_length) > 0 ? shards : short_ones).push_back(std::move(shard));
  }
  if (short_ones.empty()) return shards;
  const auto longest = std::max_element(short_ones.begin(), short_ones.end(),
                                        [](const Shard& a, const Shard& b) { return a.tokens() < b.tokens(); });
  const std::string what = too_short(*longest, options.sequence_length);
  if (shards.empty()) throw TooShort(what + "; use a shorter --seq-len or more data");
  left_out = what + "; left out";
  if (short_ones.size() > 1) left_out += ", with " + std::to_string(short_ones.size() - 1) + " more like it";
  return shards;
}

// 53 bits of FNV-1a (64 bits) over each shard's token count and vocabulary and its first, middle and last tokens.
int64_t fingerprint_of(const std::vector<Shard>& shards) {
  uint64_t hash = 0xCBF29CE484222325;
  auto mix = [&](uint64_t value) {
    for (int byte = 0; byte < 8; ++byte) hash = (hash ^ (value >> (8 * byte) & 0xFF)) * 0x100000001B3;
  };
  std::vector<int32_t> sample;
  for (const Shard& shard : shards) {
    mix(static_cast<uint64_t>(shard.tokens()));
    mix(static_cast<uint64_t>(shard.vocabulary()));
    sample.resize(static_cast<size_t>(std::min<int64_t>(shard.tokens(), 256)));
    const int64_t last = shard.tokens() - static_cast<int64_t>(sample.size());
    for (const int64_t first : {int64_t{0}, last / 2, last}) {
      shard.read(sample, first);
      for (const int32_t token : sample) mix(static_cast<uint32_t>(token));
    }
  }
  return static_cast<int64_t>(hash >> 11);
}

}  // namespace

namespace {

// Whether there is a file or folder of exactly this name.
bool is_there(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

std::string escaped(const std::string& name, const char* special) {
  std::string out;
  for (const char c : name) {
    if (std::strchr(special, c)) out += '\\';
    out += c;
  }
  return out;
}

// The glob with its first folders escaped, as far as there are folders of exactly their names, and `special` characters
// of the rest.
std::string with_literal_folders(const std::string& pattern, const char* special) {
  size_t literal = 0;
  for (size_t slash = pattern.find('/'); slash != std::string::npos; slash = pattern.find('/', slash + 1)) {
    if (slash > 0 && !is_there(pattern.substr(0, slash))) break;
    literal = slash;
  }
  return escaped(pattern.substr(0, literal), "*?[]\\") + escaped(pattern.substr(literal), special);
}

std::vector<std::string> glob_files(const std::string& pattern) {
  struct Matches : glob_t {
    Matches() : glob_t{} {}
    ~Matches() { globfree(this); }
  } matches;
  // A folder that may not be read is passed over as a shell does, unless nothing is found; other errors end the search.
  static thread_local std::string problem;
  problem.clear();
  const auto on_error = [](const char* folder, int error) -> int {
    if (error == ENOENT || error == ENOTDIR) return 0;
    problem = std::string(folder) + ": " + std::strerror(error);
    return error != EACCES;
  };
  const int status = ::glob(pattern.c_str(), GLOB_TILDE, on_error, &matches);
  if (status != 0 && (status != GLOB_NOMATCH || !problem.empty()))
    throw std::runtime_error("cannot list the files matching " + pattern +
                             (problem.empty() ? "" : " (" + problem + ")"));
  return {matches.gl_pathv, matches.gl_pathv + matches.gl_pathc};
}

bool has_files(const std::string& pattern) {
  const std::vector<std::string> found = matching_files(pattern);
  return std::any_of(found.begin(), found.end(), [](const std::string& path) {
    std::error_code ignored;
    return !std::filesystem::is_directory(path, ignored);
  });
}

}  // namespace

std::vector<std::string> matching_files(const std::string& pattern) {
  if (is_there(pattern)) return {pattern};
  const std::vector<std::string> found = glob_files(with_literal_folders(pattern, ""));
  if (!found.empty() || pattern.find('[') == std::string::npos) return found;
  return glob_files(with_literal_folders(pattern, "[]"));  // "notes[1]_train_*.bin", of a text named notes[1].txt
}

std::vector<std::string> split_globs(const std::string& patterns) {
  if (is_there(patterns)) return {patterns};
  std::vector<std::string> words, globs;
  std::istringstream list(patterns);
  for (std::string word; std::getline(list, word, ',');) words.push_back(word);
  for (size_t first = 0; first < words.size(); ++first) {
    std::string glob = words[first];
    if (glob.empty()) continue;
    // Where a word alone names no file, its comma may be part of a name.
    std::string longer = glob;
    for (size_t last = first + 1; last < words.size() && !has_files(glob); ++last) {
      longer += "," + words[last];
      if (has_files(longer)) {
        glob = longer;
        first = last;
      }
    }
    globs.push_back(glob);
  }
  return globs;
}

std::vector<std::string> expand_globs(const std::string& patterns, const std::string& flag) {
  std::vector<std::string> paths;
  for (const std::string& pattern : split_globs(patterns)) {
    const std::vector<std::string> found = matching_files(pattern);
    if (found.empty()) throw std::runtime_error("no shards match " + pattern + "; check " + flag);
    for (const std::string& path : found) {
      if (std::filesystem::is_directory(path))
        throw std::runtime_error(path + ": is a directory; name its shards, for instance '" +
                                 (path.ends_with('/') ? path : path + "/") + "*_train_*.bin'");
      paths.push_back(path);
    }
  }
  if (paths.empty()) throw std::runtime_error("no shards match '" + patterns + "'; check " + flag);
  std::sort(paths.begin(), paths.end());
  paths.erase(std::unique(paths.begin(), paths.end()), paths.end());
  return paths;
}

void group_tokens(MicroBatch& batch, int64_t vocabulary) {
  const auto positions = static_cast<int32_t>(batch.inputs.size());
  std::vector<int32_t> next(static_cast<size_t>(vocabulary), 0);  // per token: its count, then where its next one goes
  for (const int32_t token : batch.inputs) ++next[token];
  batch.group_ids.assign(batch.inputs.size(), -1);
  batch.group_starts.assign(batch.inputs.size() + 1, positions);
  batch.group_positions.resize(batch.inputs.size());
  int32_t start = 0;
  size_t group = 0;
  for (size_t token = 0; token < next.size(); ++token) {
    if (next[token] == 0) continue;
    batch.group_ids[group] = static_cast<int32_t>(token);
    batch.group_starts[group++] = start;
    start += std::exchange(next[token], start);
  }
  for (int32_t i = 0; i < positions; ++i) batch.group_positions[next[batch.inputs[i]]++] = i;
}

// Turns sequence numbers into tokens. Used by one thread at a time: it keeps the order of the epoch it read last.
class TokenLoader::Reader {
 public:
  Reader(const TokenLoaderOptions& options, std::string& left_out)
      : options_(options), shards_(open_shards(options, left_out)), fingerprint_(fingerprint_of(shards_)) {
    for (const Shard& shard : shards_) {
      tokens_ += shard.tokens();
      sequences_ += windows_in(shard, options.sequence_length);
    }
    window_.resize(static_cast<size_t>(options.sequence_length) + 1);
    if (options_.vocabulary == 0) options_.vocabulary = shards_.front().vocabulary();
  }

  const std::vector<Shard>& shards() const { return shards_; }
  int64_t tokens() const { return tokens_; }
  int64_t sequences() const { return sequences_; }
  int64_t fingerprint() const { return fingerprint_; }

  // The micro-batch of the sequences [first, first + B), counted from the start of epoch 0.
  void fill(MicroBatch& batch, int64_t first) {
    const int64_t length = options_.sequence_length;
    const auto elements = static_cast<size_t>(options_.micro_batch * length);
    batch.inputs.resize(elements);
    batch.targets.resize(elements);
    for (int64_t row = 0; row < options_.micro_batch; ++row) {
      read_window(first + row);
      std::copy(window_.begin(), window_.end() - 1, batch.inputs.begin() + row * length);
      std::copy(window_.begin() + 1, window_.end(), batch.targets.begin() + row * length);
    }
    group_tokens(batch, options_.vocabulary);
  }

 private:
  // A shard's place in an epoch.
  struct Visit {
    const Shard* shard;
    int64_t first;  // sequence of the epoch at which it begins
    std::optional<Permutation> windows;
  };

  void start_epoch(int64_t epoch) {
    const auto key = static_cast<uint32_t>(epoch);
    const Permutation order(shards_.size(), options_.seed, "shards", key);
    visits_.clear();
    int64_t first = 0;
    for (size_t place = 0; place < shards_.size(); ++place) {
      const size_t index = options_.shuffle ? order(place) : place;
      const int64_t windows = windows_in(shards_[index], options_.sequence_length);
      Visit& visit = visits_.emplace_back(Visit{&shards_[index], first, std::nullopt});
      if (options_.shuffle)
        visit.windows.emplace(static_cast<uint64_t>(windows), options_.seed,
                              "windows of shard " + std::to_string(index), key);
      first += windows;
    }
    epoch_ = epoch;
  }

  void read_window(int64_t sequence) {
    if (sequence / sequences_ != epoch_) start_epoch(sequence / sequences_);
    const int64_t in_epoch = sequence % sequences_;
    const auto after = std::upper_bound(visits_.begin(), visits_.end(), in_epoch,
                                        [](int64_t value, const Visit& visit) { return value < visit.first; });
    const Visit& visit = *(after - 1);
    int64_t window = in_epoch - visit.first;
    if (visit.windows) window = static_cast<int64_t>((*visit.windows)(static_cast<uint64_t>(window)));
    const int64_t first = window * options_.sequence_length;
    visit.shard->read(window_, first);
    check_tokens(*visit.shard, first);
  }

  void check_tokens(const Shard& shard, int64_t first) const {
    for (size_t i = 0; i < window_.size(); ++i) {
      if (window_[i] >= 0 && window_[i] < options_.vocabulary) continue;
      throw std::runtime_error(shard.path() + ": token " + std::to_string(static_cast<uint32_t>(window_[i])) +
                               " at position " + std::to_string(first + static_cast<int64_t>(i)) +
                               " is outside the model's vocabulary of " + std::to_string(options_.vocabulary) +
                               "; use data of the model's tokenizer, or a model with the data's vocabulary");
    }
  }

  TokenLoaderOptions options_;
  std::vector<Shard> shards_;
  int64_t fingerprint_;
  int64_t tokens_ = 0, sequences_ = 0;
  int64_t epoch_ = -1;  // the one visits_ describes
  std::vector<Visit> visits_;
  std::vector<int32_t> window_;  // T + 1 tokens
};

// One thread, one micro-batch ahead. After it delivers sequence s it prepares s + stride unasked; asked for another one
// (after a seek) it drops what it prepared, and any error met on the way.
class TokenLoader::Prefetcher {
 public:
  Prefetcher(Reader& reader, int64_t stride)
      : reader_(reader), stride_(stride), thread_([this](const std::stop_token& stop) { work(stop); }) {}

  void take(MicroBatch& out, int64_t sequence) {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [&] { return !pending_; });
    if (sequence_ != sequence) {
      request(sequence);
      idle_.wait(lock, [&] { return !pending_; });
    }
    if (error_) {
      sequence_ = -1;
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
    std::swap(out, slot_);
    request(sequence + stride_);
  }

 private:
  void request(int64_t sequence) {
    sequence_ = sequence;
    error_ = nullptr;
    pending_ = true;
    wake_.notify_one();
  }

  void work(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (wake_.wait(lock, stop, [&] { return pending_; })) {
      lock.unlock();  // slot_, sequence_ and error_ are this thread's while pending_ is set
      try {
        reader_.fill(slot_, sequence_);
      } catch (...) {
        error_ = std::current_exception();
      }
      lock.lock();
      pending_ = false;
      idle_.notify_one();
    }
  }

  Reader& reader_;
  int64_t stride_;
  std::mutex mutex_;
  std::condition_variable_any wake_;
  std::condition_variable idle_;
  bool pending_ = false;
  int64_t sequence_ = -1;  // in slot_, or being prepared
  MicroBatch slot_;
  std::exception_ptr error_;
  std::jthread thread_;  // last: joined before the rest goes
};

TokenLoader::TokenLoader(const TokenLoaderOptions& options) : options_(options) {
  check_options(options_);
  reader_ = std::make_unique<Reader>(options_, left_out_);
  if (options_.prefetch) prefetcher_ = std::make_unique<Prefetcher>(*reader_, options_.micro_batch * options_.ranks);
}

TokenLoader::~TokenLoader() = default;

const MicroBatch& TokenLoader::next() {
  const int64_t mine = sequence_ + options_.rank * options_.micro_batch;
  if (prefetcher_)
    prefetcher_->take(current_, mine);
  else
    reader_->fill(current_, mine);
  sequence_ += options_.micro_batch * options_.ranks;
  return current_;
}

DataPosition TokenLoader::position() const {
  return {.sequence = sequence_,
          .sequence_length = options_.sequence_length,
          .seed = options_.seed,
          .fingerprint = reader_->fingerprint()};
}

void TokenLoader::seek(const DataPosition& position) {
  if (position.fingerprint != reader_->fingerprint())
    throw std::runtime_error("cannot resume: the shards matching " + options_.pattern +
                             " are not those the run was trained on; pass the same --data");
  if (position.sequence_length != options_.sequence_length)
    throw std::runtime_error("cannot resume: the run was trained with --seq-len " +
                             std::to_string(position.sequence_length) + ", this one has " +
                             std::to_string(options_.sequence_length));
  if (position.seed != options_.seed)
    throw std::runtime_error("cannot resume: the run was trained with --seed " + std::to_string(position.seed) +
                             ", this one has " + std::to_string(options_.seed));
  if (position.sequence < 0)
    throw std::runtime_error("cannot resume: the data position " + std::to_string(position.sequence) + " is negative");
  sequence_ = position.sequence;
}

void TokenLoader::rewind() { sequence_ = 0; }

int64_t TokenLoader::shards() const { return static_cast<int64_t>(reader_->shards().size()); }
int64_t TokenLoader::tokens() const { return reader_->tokens(); }
int64_t TokenLoader::sequences_per_epoch() const { return reader_->sequences(); }
int64_t TokenLoader::tokens_per_epoch() const { return reader_->sequences() * options_.sequence_length; }
int64_t TokenLoader::vocabulary() const { return reader_->shards().front().vocabulary(); }
