// unicode_classes.h: which characters are letters, numbers and white space, as GPT-2's pre-tokenization asks, and the
// decoding of UTF-8 that goes with it. Without this table every curly quote and dash would split differently from
// tiktoken.
#pragma once

#include <cstddef>
#include <string_view>

enum class CharacterClass { kLetter, kNumber, kSpace, kOther };

inline constexpr char32_t kInvalidCode = 0xFFFFFFFF;

struct CodePoint {
  char32_t code = kInvalidCode;  // kInvalidCode: the byte at this position begins no valid UTF-8 sequence
  size_t bytes = 1;              // length of the sequence
};

// The character at byte `position` < text.size(). Overlong forms, surrogates and truncated sequences are invalid.
CodePoint decode_utf8(std::string_view text, size_t position);

// Whether all of a text is valid UTF-8.
bool is_utf8(std::string_view text);

// Unicode's \p{L}, \p{N}, \s, or none of them. kInvalidCode is kOther.
CharacterClass character_class(char32_t code);
