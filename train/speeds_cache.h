// speeds_cache.h: measured speeds in a file of the user's cache directory, so that a machine is measured once.
#pragma once

#include <optional>
#include <string>

#include "train/speeds.h"

// ${XDG_CACHE_HOME:-$HOME/.cache}/train_gpt2/speeds.json; empty when neither variable is set.
std::string speeds_cache_path();

// Speeds stored under `key`; nothing when there are none or the file is damaged.
std::optional<Speeds> cached_speeds(const std::string& path, const std::string& key);

// Adds an entry, keeping the others; a damaged file is replaced. A file that cannot be written is no error.
void cache_speeds(const std::string& path, const std::string& key, const Speeds& speeds);
