// option_values.cpp: see option_values.h.
#include "train/option_values.h"

#include <cfloat>
#include <charconv>
#include <cstdio>
#include <sstream>

#include "data/unicode_classes.h"

namespace {

[[noreturn]] void refuse(const std::string& flag, const std::string& why) { throw UsageError("--" + flag + " " + why); }

template <typename T>
T number_of(const std::string& flag, const std::string& text) {
  const char* const end = text.data() + text.size();
  T value{};
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (text.empty()) refuse(flag, "needs a value");
  if (error == std::errc::result_out_of_range && rest == end) refuse(flag, text + " is out of range");
  if (error != std::errc() || rest != end) {
    refuse(flag,
           std::string("needs a ") + (std::is_same_v<T, double> ? "number" : "whole number") + ", not '" + text + "'");
  }
  return value;
}

std::string short_text(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace

std::string offload_name(const Offload& offload) {
  std::string list;
  const auto add = [&](bool offloaded, const char* what) {
    if (offloaded) list += (list.empty() ? "" : ",") + std::string(what);
  };
  add(offload.activations, "activations");
  add(offload.state && !offload.weights, "state");
  add(offload.weights, "weights");
  return list.empty() ? "none" : list;
}

void read(Offload& field, const std::string& flag, const std::string& text, OffloadList) {
  if (text.empty()) refuse(flag, "needs a value");
  Offload found = {.layers_in_flight = field.layers_in_flight};
  std::istringstream list(text);
  for (std::string what; std::getline(list, what, ',');) {
    if (what == "activations") {
      found.activations = true;
    } else if (what == "state") {
      found.state = true;
    } else if (what == "weights") {
      found.weights = found.state = true;
    } else if (text != "none") {
      refuse(flag, text + ": '" + what + "' is none of activations, state, weights; or leave it at none");
    }
  }
  if (text.back() == ',') refuse(flag, text + ": nothing after the comma");
  field = found;
}

void read(bool& field, const std::string& flag, const std::string& text, Switch values) {
  if (text != "true" && text != "false") refuse(flag, "is true or false, not '" + text + "'");
  field = (text == "true") == values.given;
}

void read(std::string& field, const std::string& flag, const std::string& text, Text values) {
  if (text.empty() && !values.may_be_empty) refuse(flag, "needs a value");
  if (!is_utf8(text)) refuse(flag, "'" + text + "' is not UTF-8, as what is written into a run must be");
  field = text;
}

int64_t read_whole_number(const std::string& flag, const std::string& text, const Range& range) {
  const auto value = number_of<int64_t>(flag, text), least = static_cast<int64_t>(range.least);
  if (value < least) refuse(flag, "must be at least " + std::to_string(least));
  if (value > range.most) refuse(flag, "must be at most " + std::to_string(range.most));
  return value;
}

double read_number(const std::string& flag, const std::string& text, const Range& range) {
  const auto value = number_of<double>(flag, text);
  if (!std::isfinite(value)) refuse(flag, "must be a finite number");
  if (std::abs(value) > FLT_MAX) refuse(flag, text + " is more than fp32 holds");
  if (value != 0 && std::abs(value) < FLT_MIN) refuse(flag, text + " is less than fp32 holds: it would be 0");
  if (value != 1 && static_cast<float>(value) == 1.0f) refuse(flag, text + " would be 1 in fp32");
  const bool too_small = value < range.least || (value == range.least && !range.least_itself);
  if (!too_small && value < range.below && value <= range.at_most) return value;
  std::string bounds;
  if (std::isfinite(range.least)) bounds = (range.least_itself ? "at least " : "above ") + short_text(range.least);
  if (std::isfinite(range.below)) bounds += (bounds.empty() ? "below " : " and below ") + short_text(range.below);
  if (std::isfinite(range.at_most))
    bounds += (bounds.empty() ? "at most " : " and at most ") + short_text(range.at_most);
  refuse(flag, "must be " + bounds);
}
