// json_text.cpp: see json_text.h.
#include "data/json_text.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <vector>

namespace {

constexpr int kDeepest = 32;

std::string place_of(std::string_view text, size_t byte) {
  if (byte > text.size()) return "it ends too early";
  const std::string_view before = text.substr(0, byte == 0 ? 0 : byte - 1);
  const size_t line = static_cast<size_t>(std::count(before.begin(), before.end(), '\n')) + 1;
  const size_t newline = before.rfind('\n');
  const size_t column = newline == std::string_view::npos ? before.size() + 1 : before.size() - newline;
  return "at line " + std::to_string(line) + ", column " + std::to_string(column);
}

}  // namespace

std::string problem_of(const nlohmann::json::exception& error) {
  const std::string_view message = error.what();
  const size_t prefix = message.find("] ");
  return std::string(message.substr(prefix == std::string_view::npos ? 0 : prefix + 2));
}

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> names;  // of the objects that are open
  const auto check = [&](int depth, Event event, nlohmann::json& value) {
    if ((event == Event::object_start || event == Event::array_start) && depth >= kDeepest) {
      throw std::runtime_error(where + ": nests deeper than " + std::to_string(kDeepest) + " levels");
    }
    if (event == Event::object_start) names.emplace_back();
    if (event == Event::object_end) names.pop_back();
    if (event == Event::key && !names.back().insert(value.get<std::string>()).second) {
      throw std::runtime_error(where + ": has " + value.dump().substr(0, 100) + " twice in one object");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::parse_error& error) {
    throw std::runtime_error(where + ": not valid JSON (" + place_of(text, error.byte) + ")");
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(where + ": not valid JSON (" + problem_of(error).substr(0, 200) + ")");
  }
}
