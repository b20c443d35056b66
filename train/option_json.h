// option_json.h: what an option holds, written as JSON; a float by the fewest digits that make it again. Apart from
// option_values.h, because most that read options write none and the library takes the compiler a second.
#pragma once

#include <charconv>
#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>
#include <utility>

#include "train/option_values.h"

inline nlohmann::ordered_json written(bool field, Switch values) { return field == values.given; }
inline nlohmann::ordered_json written(const std::string& field, Text) { return field; }
inline nlohmann::ordered_json written(const Offload& field, OffloadList) { return offload_name(field); }

template <typename T>
nlohmann::ordered_json written(T field, const Range&) {
  if constexpr (!std::is_same_v<T, float>) return field;
  char text[32];
  double value = 0;
  std::from_chars(text, std::to_chars(text, text + sizeof text, field).ptr, value);
  return value;
}

template <typename T, size_t N>
nlohmann::ordered_json written(T field, const std::pair<T, const char*> (&names)[N]) {
  return name_of(names, field);
}
