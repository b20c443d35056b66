// json_text.h: JSON that came from a file. Nothing in it can exhaust the stack: nesting is bounded while it is parsed.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

// Throws std::runtime_error in one line, `where` first, for what is not JSON, says a name twice in one object, has a
// number out of range or nests deeper than any file of ours.
nlohmann::json parse_json(std::string_view text, const std::string& where);

// What a value of a wrong type or a missing one is called in a message, without the library's own prefix.
std::string problem_of(const nlohmann::json::exception& error);
