// config_file.cpp: see config_file.h.
#include "train/config_file.h"

#include <algorithm>
#include <map>
#include <sstream>

#include "data/input_file.h"
#include "train/options.h"

namespace {

constexpr char kSpaces[] = " \t";

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(kSpaces), end = text.find_last_not_of(kSpaces);
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

// A string in quotes, from the opening one; `end` is one past the closing one.
std::string quoted(const std::string& text, size_t& end, const std::string& where) {
  const char quote = text[0];
  std::string value;
  for (end = 1; end < text.size() && text[end] != quote; ++end) {
    char c = text[end];
    if (quote == '"' && c == '\\') {
      const char escaped = ++end < text.size() ? text[end] : '\0';
      if (escaped != '"' && escaped != '\\' && escaped != 'n' && escaped != 't') {
        throw UsageError(where + ": after a \\ comes one of \" \\ n t; in '...' a \\ is itself");
      }
      c = escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped;
    }
    value += c;
  }
  if (end >= text.size()) throw UsageError(where + ": the string has no closing " + quote);
  ++end;
  return value;
}

// Numbers may have their digits in groups: 1_000_000.
std::string without_groups(std::string word) {
  if (word.find_first_not_of("0123456789_") == std::string::npos && word.front() != '_' && word.back() != '_') {
    std::erase(word, '_');
  }
  return word;
}

std::string value_of(const std::string& text, const std::string& where) {
  if (text.empty() || text[0] == '#') throw UsageError(where + ": needs a value");
  if (text[0] == '[') throw UsageError(where + ": takes one value, not a list; write \"one,two\" for several");
  size_t end = 0;
  std::string value;
  if (text[0] == '"' || text[0] == '\'') {
    value = quoted(text, end, where);
  } else {
    end = std::min(text.find_first_of(" \t#"), text.size());
    if (text.find_first_of("\"'[]{}\\") < end) throw UsageError(where + ": a value like this needs quotes: \"...\"");
    value = without_groups(text.substr(0, end));
  }
  const std::string rest = trimmed(text.substr(end));
  if (!rest.empty() && rest[0] != '#') throw UsageError(where + ": there is more after the value; put it in quotes");
  return value;
}

}  // namespace

std::vector<ConfigLine> read_config_file(const std::string& path) {
  std::string contents;
  try {
    contents = read_file(path);
  } catch (const std::runtime_error& error) {
    throw UsageError(std::string("--config ") + error.what());
  }
  if (contents.starts_with("\xef\xbb\xbf")) contents.erase(0, 3);  // a byte order mark
  std::vector<ConfigLine> lines;
  std::map<std::string, int> seen;
  std::istringstream text(contents);
  std::string line;
  for (int number = 1; std::getline(text, line); ++number) {
    const std::string where = path + ":" + std::to_string(number);
    if (line.ends_with('\r')) line.pop_back();
    const auto control = [](unsigned char c) { return (c < 0x20 && c != '\t') || c == 0x7f; };
    if (std::any_of(line.begin(), line.end(), control)) throw UsageError(where + ": is no text");
    line = trimmed(line);
    if (line.empty() || line[0] == '#') continue;
    if (line[0] == '[') throw UsageError(where + ": sections are not used here: name = value, the names as in --help");
    const size_t equals = line.find('=');
    const std::string name = trimmed(line.substr(0, equals));
    if (equals == std::string::npos || name.empty()) throw UsageError(where + ": is not name = value");
    const auto [first, fresh] = seen.try_emplace(name, number);
    if (!fresh) {
      throw UsageError(where + ": '" + name + "' is there already, in line " + std::to_string(first->second));
    }
    lines.push_back({name, value_of(trimmed(line.substr(equals + 1)), where + ": '" + name + "'"), where});
  }
  return lines;
}
