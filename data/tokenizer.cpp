// tokenizer.cpp: see tokenizer.h. The vocabulary is held twice, by id and by bytes: about 5 MB for GPT-2's.
#include "data/tokenizer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <queue>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "data/input_file.h"
#include "data/shard.h"
#include "data/unicode_classes.h"

namespace {

// Reads the bytes of a tokenizer file one field after another.
class TokenizerFile {
 public:
  explicit TokenizerFile(const std::string& path) : path_(path) {
    try {
      bytes_ = read_file(path);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(error.what()) + "; data/prepare.py writes a tokenizer beside the shards");
    }
    if (bytes_.empty()) fail("the tokenizer file is empty; prepare it again");
  }

  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(path_ + ": " + what); }

  std::string_view take(size_t count, const char* what) {
    if (bytes_.size() - position_ < count)
      fail("truncated: " + std::string(what) + " needs " + std::to_string(position_ + count) + " bytes, the file has " +
           std::to_string(bytes_.size()) + "; prepare it again");
    position_ += count;
    return std::string_view(bytes_).substr(position_ - count, count);
  }

 private:
  std::string path_, bytes_;
  size_t position_ = 0;
};

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

constexpr int32_t kNoLimit = std::numeric_limits<int32_t>::max();

}  // namespace

Tokenizer::Tokenizer(std::vector<std::string> tokens, int32_t end_of_text)
    : tokens_(std::move(tokens)), end_of_text_(end_of_text) {
  ids_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id)
    if (static_cast<int32_t>(id) != end_of_text_ && !tokens_[id].empty())
      ids_.try_emplace(tokens_[id], static_cast<int32_t>(id));
}

Tokenizer Tokenizer::with_merges(std::vector<std::string> tokens, const std::vector<Merge>& merges,
                                 int32_t end_of_text) {
  Tokenizer tokenizer(std::move(tokens), end_of_text);
  tokenizer.merge_list_ = merges;
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto [left, right] = merges[i];
    const std::string whole = std::string(tokenizer.token_bytes(left)) + std::string(tokenizer.token_bytes(right));
    if (tokenizer.find(whole) < 0) throw std::runtime_error("merge " + std::to_string(i) + " makes no token");
    tokenizer.order_of_.try_emplace(pair_key(left, right), static_cast<int32_t>(i));
  }
  return tokenizer;
}

Tokenizer Tokenizer::bytes() {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  tokens.emplace_back("<|endoftext|>");
  return Tokenizer(std::move(tokens), 256);
}

Tokenizer Tokenizer::from_file(const std::string& path) {
  TokenizerFile file(path);
  uint32_t header[4] = {};
  // The magic is judged before the length, so that a short file of another kind is called by its name.
  std::memcpy(&header[0], file.take(sizeof(uint32_t), "the header").data(), sizeof(uint32_t));
  if (header[0] != static_cast<uint32_t>(kTokenizerMagic))
    file.fail("not an llm.c tokenizer (its first word is " + std::to_string(header[0]) + ", expected " +
              std::to_string(kTokenizerMagic) +
              "); pass the tokenizer.bin that data/prepare.py wrote beside the shards");
  const std::string_view rest = file.take((kHeaderWords - 1) * sizeof(uint32_t), "the header");
  std::memcpy(&header[1], rest.data(), 3 * sizeof(uint32_t));
  const auto [magic, version, vocabulary, end_of_text] = std::tie(header[0], header[1], header[2], header[3]);
  if (version != 1 && version != 2)
    file.fail("version " + std::to_string(version) + " of the tokenizer format is unknown, expected 1 or 2");
  if (vocabulary == 0 || vocabulary > (uint32_t{1} << 30))
    file.fail("the header says " + std::to_string(vocabulary) + " tokens; prepare it again");
  // Version 1 was only ever written for GPT-2, whose last token is the end-of-text one.
  const uint32_t end = version == 1 ? vocabulary - 1 : end_of_text;
  if (end >= vocabulary)
    file.fail("the end-of-text token " + std::to_string(end) + " is outside the vocabulary of " +
              std::to_string(vocabulary) + "; prepare it again");
  std::vector<std::string> tokens;
  for (uint32_t id = 0; id < vocabulary; ++id) {
    const std::string name = "token " + std::to_string(id) + " of " + std::to_string(vocabulary);
    const auto length = static_cast<unsigned char>(file.take(1, name.c_str())[0]);
    tokens.emplace_back(file.take(length, name.c_str()));
  }
  return Tokenizer(std::move(tokens), static_cast<int32_t>(end));
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
  if (id < 0 || id >= vocabulary())
    throw std::runtime_error("token " + std::to_string(id) + " is outside the tokenizer's vocabulary of " +
                             std::to_string(vocabulary()));
  return tokens_[static_cast<size_t>(id)];
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) text += token_bytes(id);
  return text;
}

std::optional<int64_t> Tokenizer::text_bytes(std::span<const int32_t> ids) const {
  int64_t bytes = 0;
  for (const int32_t id : ids) {
    if (!has(id)) return std::nullopt;
    if (id != end_of_text_) bytes += static_cast<int64_t>(token_bytes(id).size());
  }
  return bytes;
}

bool Tokenizer::has(int32_t id) const {
  return id >= 0 && id < vocabulary() && (id == end_of_text_ || !tokens_[static_cast<size_t>(id)].empty());
}

int32_t Tokenizer::find(std::string_view text) const {
  const auto found = ids_.find(text);
  return found == ids_.end() ? -1 : found->second;
}

int32_t Tokenizer::order(std::string_view left, std::string_view right) const {
  if (merge_list_.empty()) return find({left.data(), left.size() + right.size()});  // they lie side by side
  const auto found = order_of_.find(pair_key(find(left), find(right)));
  return found == order_of_.end() ? -1 : found->second;
}

std::vector<Tokenizer::Merge> Tokenizer::merges() const {
  if (!merge_list_.empty()) return merge_list_;
  std::vector<Merge> merges;
  for (int32_t id = 0; id < vocabulary(); ++id) {
    const std::string_view token = tokens_[static_cast<size_t>(id)];
    if (token.size() < 2 || find(token) != id) continue;
    std::vector<int32_t> parts;
    encode_word(parts, token, id);
    if (parts.size() != 2) return {};
    merges.emplace_back(parts[0], parts[1]);
  }
  return merges;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  for (const std::string_view word : split_words(text)) encode_word(ids, word, kNoLimit);
  return ids;
}

// The parts of the word are a doubly linked list of byte ranges; a queue holds the possible merges, lowest rank and
// then leftmost first. A merge is stale, and skipped, when its parts have changed since it was queued.
void Tokenizer::encode_word(std::vector<int32_t>& out, std::string_view word, int32_t limit) const {
  // Without a list of merges every token is reached.
  if (const int32_t whole = find(word); merge_list_.empty() && whole >= 0 && whole < limit) {
    out.push_back(whole);
    return;
  }
  struct Part {
    size_t end, previous, next;  // one past its last byte; neighbours, by where they begin
  };
  using Candidate = std::tuple<int32_t, size_t, size_t>;  // order, begin and end of the merged part
  const size_t size = word.size();
  std::vector<Part> parts(size + 1);  // by first byte; one past the last as a sentinel
  std::vector<bool> alive(size, true);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> merges;
  auto propose = [&](size_t begin) {
    const size_t second = parts[begin].next;
    if (second >= size) return;
    const size_t end = parts[second].end;
    const int32_t merge = order(word.substr(begin, second - begin), word.substr(second, end - second));
    if (merge >= 0 && merge < limit) merges.emplace(merge, begin, end);
  };
  for (size_t i = 0; i <= size; ++i) parts[i] = {.end = i + 1, .previous = i - 1, .next = i + 1};
  for (size_t i = 0; i + 1 < size; ++i) propose(i);
  while (!merges.empty()) {
    const auto [merged, begin, end] = merges.top();
    merges.pop();
    const size_t second = alive[begin] ? parts[begin].next : size;
    if (second >= size || parts[second].end != end) continue;
    alive[second] = false;
    parts[begin].end = end;
    parts[begin].next = parts[second].next;
    parts[parts[begin].next].previous = begin;
    propose(begin);
    if (begin > 0) propose(parts[begin].previous);
  }
  for (size_t i = 0; i < size; i = parts[i].next) {
    const int32_t id = find(word.substr(i, parts[i].end - i));
    if (id < 0)
      throw std::runtime_error("the tokenizer has no token for byte " +
                               std::to_string(static_cast<unsigned char>(word[i])) + " of the text");
    out.push_back(id);
  }
}

std::string printable(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const CodePoint point = decode_utf8(text, i);
    const bool control =
        (point.code < 0x20 && point.code != '\n' && point.code != '\t') || (point.code >= 0x7f && point.code < 0xa0);
    if (control || point.code == kInvalidCode) {
      out += "\xef\xbf\xbd";
    } else {
      out += text.substr(i, point.bytes);
    }
    i += point.bytes;
  }
  return out;
}

std::string_view whole_characters(std::string_view text) {
  for (size_t cut = 1; cut <= std::min<size_t>(3, text.size()); ++cut) {
    const std::string_view whole = text.substr(0, text.size() - cut), rest = text.substr(whole.size());
    // What begins a character becomes one with the smallest or the largest bytes behind it.
    for (const char byte : {'\x80', '\xbf'}) {
      const CodePoint point = decode_utf8(std::string(rest) + std::string(3, byte), 0);
      if (point.code != kInvalidCode && point.bytes > cut) return whole;
    }
  }
  return text;
}

std::vector<std::string_view> split_words(std::string_view text) {
  auto class_at = [&](size_t position) { return character_class(decode_utf8(text, position).code); };
  // End of the run of characters of one class that begins at `position`.
  auto run_end = [&](size_t position, CharacterClass wanted) {
    while (position < text.size() && class_at(position) == wanted) position += decode_utf8(text, position).bytes;
    return position;
  };
  auto contraction_at = [&](size_t position) -> size_t {
    constexpr std::string_view kContractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (const std::string_view contraction : kContractions)
      if (text.substr(position).starts_with(contraction)) return contraction.size();
    return 0;
  };
  std::vector<std::string_view> words;
  for (size_t start = 0; start < text.size();) {
    size_t end = start + contraction_at(start);
    if (end == start) {
      const size_t body = start + (text[start] == ' ' ? 1 : 0);
      const bool blank = body == text.size() || class_at(body) == CharacterClass::kSpace;
      if (!blank) {
        end = run_end(body, class_at(body));
      } else {
        // White space before a word leaves its last character to that word, unless it is the only one.
        end = run_end(start, CharacterClass::kSpace);
        size_t last = start;
        for (size_t i = start; i < end; i += decode_utf8(text, i).bytes) last = i;
        if (end < text.size() && last > start) end = last;
      }
    }
    words.push_back(text.substr(start, end - start));
    start = end;
  }
  return words;
}
