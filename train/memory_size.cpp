// memory_size.cpp: see memory_size.h.
#include "train/memory_size.h"

#include <cctype>
#include <charconv>
#include <cmath>
#include <map>

#include "train/options.h"

namespace {

// Factor of a unit in lower case; 0 for an unknown one.
double unit_factor(const std::string& unit) {
  static const std::map<std::string, double> factors = [] {
    std::map<std::string, double> table = {{"", 1}, {"b", 1}};
    double binary = 1, decimal = 1;
    for (const char* prefix : {"k", "m", "g", "t"}) {
      binary *= 1024;
      decimal *= 1000;
      const std::string letter = prefix;
      table[letter] = table[letter + "i"] = table[letter + "ib"] = binary;
      table[letter + "b"] = decimal;
    }
    return table;
  }();
  const auto found = factors.find(unit);
  return found == factors.end() ? 0 : found->second;
}

}  // namespace

size_t parse_memory_size(const std::string& flag, const std::string& text) {
  constexpr double kLargest = 0x1p60;  // sums of sizes must not overflow
  const auto refuse = [&](const std::string& what) -> size_t {
    throw UsageError("--" + flag + " '" + text + "' " + what +
                     ": a number with KiB, MiB, GiB, TiB (or K, M, G, T; powers of 1024), KB, MB, GB, TB (powers of "
                     "1000) or nothing (bytes), as in 24GiB, 500MB or 8e9");
  };
  double number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || !std::isfinite(number)) return refuse("is no amount of memory");
  std::string unit;
  for (const char* c = rest; c < end; ++c) {
    if (*c != ' ') unit += static_cast<char>(std::tolower(static_cast<unsigned char>(*c)));
  }
  const double factor = unit_factor(unit);
  if (factor == 0) return refuse("has an unknown unit");
  const double bytes = number * factor;
  if (!(bytes >= 1)) return refuse("must be at least a byte");
  if (bytes > kLargest) return refuse("is more than any machine has");
  return static_cast<size_t>(bytes);
}
