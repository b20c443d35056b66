// shard_writer.h: writes one token shard in llm.c's format, uint16 tokens, whole or not at all.
#pragma once

#include <cstdint>
#include <span>
#include <string>

// Writes header and tokens to a temporary file beside `path`, syncs it, and renames it. `vocabulary` goes to header[3].
// Throws std::runtime_error naming the file when it cannot be written (the temporary file is removed), and
// std::logic_error when there are no tokens, too many for the header, or one of them is not below the vocabulary.
void write_shard(const std::string& path, std::span<const uint16_t> tokens, int64_t vocabulary);
