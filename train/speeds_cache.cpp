// speeds_cache.cpp: see speeds_cache.h. The file is one JSON object: key -> object of numbers. It is replaced as a
// whole by renaming, so that two runs at a time leave one of two good files.
#include "train/speeds_cache.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/input_file.h"
#include "data/json_text.h"

namespace fs = std::filesystem;

namespace {

// Calls visit(name, field) for every number.
template <typename SpeedsT, typename Visit>
void each_number(SpeedsT& s, Visit&& visit) {
  const auto cost = [&](const char* name, auto& value) {
    visit(std::string(name) + "_per_call", value.per_call);
    visit(std::string(name) + "_per_unit", value.per_unit);
  };
  cost("linear_forward", s.linear_forward);
  cost("linear_input_gradient", s.linear_input_gradient);
  cost("linear_weight_gradient", s.linear_weight_gradient);
  cost("attention_forward", s.attention_forward);
  cost("attention_backward", s.attention_backward);
  cost("norms", s.norms);
  cost("gelu", s.gelu);
  cost("norms_backward", s.norms_backward);
  cost("logits", s.logits);
  cost("classifier", s.classifier);
  cost("head_input_gradient", s.head_input_gradient);
  cost("head_weight_gradient", s.head_weight_gradient);
  visit("update_block", s.update_block);
  visit("update_row", s.update_row);
  visit("decode_block", s.decode_block);
  visit("encode_block", s.encode_block);
  visit("bandwidth", s.bandwidth);
  visit("to_device", s.to_device);
  visit("to_host", s.to_host);
}

nlohmann::json read_all(const std::string& path) {
  try {
    const nlohmann::json json = parse_json(read_file(path), path);
    if (json.is_object()) return json;
  } catch (const std::runtime_error&) {
    // Absent or damaged: measured anew.
  }
  return nlohmann::json::object();
}

}  // namespace

std::string speeds_cache_path() {
  const auto below = [](const char* directory, const char* rest) {
    return directory && *directory ? std::string(directory) + rest : std::string();
  };
  const std::string chosen = below(std::getenv("XDG_CACHE_HOME"), "/train_gpt2/speeds.json");
  return !chosen.empty() ? chosen : below(std::getenv("HOME"), "/.cache/train_gpt2/speeds.json");
}

std::optional<Speeds> cached_speeds(const std::string& path, const std::string& key) {
  const nlohmann::json all = read_all(path);
  if (!all.contains(key) || !all[key].is_object()) return std::nullopt;
  const nlohmann::json& entry = all[key];
  Speeds speeds;
  bool whole = entry.contains("copies_overlap") && entry["copies_overlap"].is_boolean();
  each_number(speeds, [&](const std::string& name, double& field) {
    whole = whole && entry.contains(name) && entry[name].is_number();
    if (!whole) return;
    field = entry[name].get<double>();
    whole = std::isfinite(field) && field >= 0;
  });
  if (!whole || !(speeds.bandwidth > 0 && speeds.to_device > 0 && speeds.to_host > 0)) return std::nullopt;
  speeds.copies_overlap = entry["copies_overlap"].get<bool>();
  speeds.measured = true;
  return speeds;
}

void cache_speeds(const std::string& path, const std::string& key, const Speeds& speeds) {
  nlohmann::json all = read_all(path);
  nlohmann::json& entry = all[key] = nlohmann::json::object();
  entry["copies_overlap"] = speeds.copies_overlap;
  each_number(speeds, [&](const std::string& name, double field) { entry[name] = field; });
  std::error_code error;
  fs::create_directories(fs::path(path).parent_path(), error);
  const std::string temporary = path + "." + std::to_string(getpid());
  {
    std::ofstream file(temporary);
    file << all.dump(1) << "\n";
    if (!file.flush()) {
      file.close();
      fs::remove(temporary, error);
      return;
    }
  }
  fs::rename(temporary, path, error);
  if (error) fs::remove(temporary, error);
}
