// config_file.h: the file of --config: TOML as far as flags need it, one `name = value` per line.
#pragma once

#include <string>
#include <vector>

struct ConfigLine {
  std::string name;   // of a flag, without the dashes
  std::string value;  // as on the command line; of a flag without a value: true or false
  std::string where;  // "run.toml:3", for messages
};

// Values are numbers, true, false, "strings" (with \" \\ \n \t), 'strings as they are' and words; # begins a comment.
// Throws UsageError naming file and line for a file that cannot be read, a list, a section, a name that is there twice,
// or anything else.
std::vector<ConfigLine> read_config_file(const std::string& path);
