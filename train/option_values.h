// option_values.h: what an option can hold: how a value is read from a text. The kinds are Switch, Text, Range of a
// number, a table of names of an enumeration (which stands beside it), and the list of --offload.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "train/engine.h"

// A mistake in how the program was called: one line, exit code 2. Failures at run time are std::runtime_error, exit
// code 1.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A bool, and what it is when the flag is given.
struct Switch {
  bool given = true;
};

struct Text {
  bool may_be_empty = false;
};

// The numbers a flag takes. Sizes and counts are multiplied with each other, and positions on the device are 32 bits
// wide.
struct Range {
  double least = -INFINITY, below = INFINITY, at_most = INFINITY;  // below: not itself
  bool least_itself = true;
  int64_t most = INT32_MAX;  // of whole numbers
};
constexpr Range at_least(double least, int64_t most = INT32_MAX) { return {.least = least, .most = most}; }
inline constexpr Range kAboveZero = {.least = 0, .least_itself = false}, kBelowZero = {.below = 0},
                       kFraction = {.least = 0, .below = 1},
                       kAboveZeroToOne = {.least = 0, .at_most = 1, .least_itself = false};

struct OffloadList {};

// The name of a value in a table of names.
template <typename T, size_t N>
std::string name_of(const std::pair<T, const char*> (&names)[N], const std::type_identity_t<T>& value) {
  for (const auto& [entry, name] : names) {
    if (entry == value) return name;
  }
  throw std::logic_error("a value without a name");
}

// "none", or a list such as "activations,weights"; weights bring their state along.
std::string offload_name(const Offload& offload);

// Each reads a value from a text, or throws UsageError naming the flag and what it takes. Fractions become fp32, where
// one that is 0 or 1 by rounding would switch off what it scales.
void read(bool& field, const std::string& flag, const std::string& text, Switch values);
void read(std::string& field, const std::string& flag, const std::string& text, Text values);
void read(Offload& field, const std::string& flag, const std::string& text, OffloadList values);
int64_t read_whole_number(const std::string& flag, const std::string& text, const Range& range);
double read_number(const std::string& flag, const std::string& text, const Range& range);

template <typename T>
void read(T& field, const std::string& flag, const std::string& text, const Range& range) {
  if constexpr (std::is_integral_v<T>) field = static_cast<T>(read_whole_number(flag, text, range));
  if constexpr (std::is_floating_point_v<T>) field = static_cast<T>(read_number(flag, text, range));
}

template <typename T, size_t N>
void read(T& field, const std::string& flag, const std::string& text, const std::pair<T, const char*> (&names)[N]) {
  std::string all;
  for (const auto& [value, name] : names) {
    if (text == name) {
      field = value;
      return;
    }
    all += (all.empty() ? "" : ", ") + std::string(name);
  }
  throw UsageError("--" + flag + (text.empty() ? " needs a value" : " '" + text + "' is none of " + all));
}
