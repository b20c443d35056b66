// memory_size.h: amounts of memory as a user writes them: 24GiB, 500MB, 8e9.
#pragma once

#include <cstddef>
#include <string>

// Bytes of "24GiB" (2^30), "24GB" (10^9), "8G" (as 8GiB), "8e9" or "512" (bytes); K, M, G and T in either case.
// Throws UsageError naming `flag` and what is accepted for anything else, for zero, and for less than a byte.
size_t parse_memory_size(const std::string& flag, const std::string& text);
