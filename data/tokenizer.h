// tokenizer.h: text to token ids and back, for prompts and samples; training data is tokenized beforehand by
// data/prepare.py. Encoding costs O(n log n) per word of n bytes, decoding one copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

class Tokenizer {
 public:
  using Merge = std::pair<int32_t, int32_t>;  // two tokens that become the one with the bytes of both

  // 256 bytes and the end-of-text token 256.
  static Tokenizer bytes();
  // Byte-pair encoding by a list of merges, the first before the others, as Hugging Face has it; tokens[id] is empty
  // for an id that is not used. Throws std::runtime_error for a merge whose result is no token.
  static Tokenizer with_merges(std::vector<std::string> tokens, const std::vector<Merge>& merges, int32_t end_of_text);
  // Reads llm.c's tokenizer.bin, version 1 or 2. Throws std::runtime_error, one line naming file and remedy, when it is
  // missing, truncated, not a tokenizer, or of an unknown version.
  static Tokenizer from_file(const std::string& path);

  int64_t vocabulary() const { return static_cast<int64_t>(tokens_.size()); }
  int32_t end_of_text() const { return end_of_text_; }

  // The bytes of the tokens, one after another; not always valid UTF-8, as a token may hold part of a character. Throws
  // std::runtime_error naming an id outside the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;
  std::string_view token_bytes(int32_t id) const;
  // How many bytes of text the tokens are: the end-of-text token is none. Nothing when one of them is not a token.
  std::optional<int64_t> text_bytes(std::span<const int32_t> ids) const;
  // Whether there is a token of this id, and not a gap or the padding of a model's vocabulary.
  bool has(int32_t id) const;

  // Byte-pair encoding with ids as ranks, as tiktoken's encode_ordinary (unless there is a list of merges): the text is
  // cut by GPT-2's rules (see split_words), then in each word the adjacent pair whose concatenation has the lowest id
  // is merged until none is left. No text becomes the end-of-text token. Bytes that are not UTF-8 count as punctuation.
  // Throws std::runtime_error when the vocabulary lacks a byte of the text.
  std::vector<int32_t> encode(std::string_view text) const;

  // The merges that encode() makes, the first before the others. Where ids are ranks, they follow from those: each
  // token is made from the two parts that the tokens before it leave. Empty when a token is not made from two.
  std::vector<Merge> merges() const;

 private:
  struct BytesHash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };

  Tokenizer(std::vector<std::string> tokens, int32_t end_of_text);
  // Merges as long as a merge comes before `limit`.
  void encode_word(std::vector<int32_t>& out, std::string_view word, int32_t limit) const;
  int32_t find(std::string_view text) const;  // id of the token with these bytes, or -1
  // When the parts left + right of a text may be merged: the order of the merge; else -1.
  int32_t order(std::string_view left, std::string_view right) const;

  std::vector<std::string> tokens_;  // bytes of each id
  std::unordered_map<std::string, int32_t, BytesHash, std::equal_to<>> ids_;
  std::vector<Merge> merge_list_;                   // empty: ids are ranks
  std::unordered_map<uint64_t, int32_t> order_of_;  // of merge_list_
  int32_t end_of_text_;
};

// The text as a terminal can show it: control characters other than newline and tab, and bytes that are not UTF-8 (the
// half of a character, a byte model's noise), become U+FFFD.
std::string printable(std::string_view text);

// The text without the beginning of a character at its end, as where a sample was cut.
std::string_view whole_characters(std::string_view text);

// GPT-2's pre-tokenization (Radford et al., 2019): the consecutive matches of
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::vector<std::string_view> split_words(std::string_view text);
